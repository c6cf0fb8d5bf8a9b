"""A network's probabilities mixed with those of the n-grams counted in the training text, and of the recent tokens.

Shapes: C contexts, J pairs (a context and a token that follows it), K context tokens of the longest n-grams, N events,
P output size, R recent tokens, V vocabulary. All contexts of the orders 2 .. K + 1 lie in one table.

Counting learns in one pass over a small text what a network learns in minutes. For each order n, the estimate is

    p_n(token | context) = (count - d(count)) / total + (sum of d / total) * p_(n-1)(token | shorter context)

with one discount d for counts of one, one for two and one for more (Chen and Goodman 1999,
https://doi.org/10.1006/csla.1999.0128; `count_ngrams` says what shorter n-grams count); p_0 is 1 / V. A further
estimate, `RecentTokens`, is that of the last tokens read. A small network, the gate, weighs the estimates and
the language model's probability by how often a context was seen and by the model's state. Each of them sums to one over
the vocabulary, and so does the mixture.

In training, the counts that predict an event exclude what they learnt from it: in a stream the whole column of the
event, elsewhere this one event. Otherwise the gate would trust contexts that were seen once, which make every event of
the training text certain. A text also repeats itself from page to page, so in a stream the gate would trust counts more
than a new text deserves if only the one event were excluded. Order 1 excludes nothing: the vocabulary is of this text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmtrain.model.ngrams.counting import PARTS, column_keys, context_keys
from lmtrain.model.ngrams.history import History
from lmtrain.model.ngrams.recent import RecentTokens

GATE_SIZE = 64  # size of the gate's hidden layer
STATISTICS = 4  # numbers of each context: the sums of its counts and of their discounts, how many, how many are 1


class Mixture(NamedTuple):
    """Logarithms of a mixture's parts for N events."""

    log_weights: Tensor  # (N, 1 + estimates) weights of the network, then of each estimate
    log_estimates: Tensor  # (N, estimates) of the target: of each order from 2 up, then of the recent tokens


class _Table(nn.Module):
    """The counts of all contexts of several orders, and after them one context that was never seen.

    Attributes:
        slices: of each order in `contexts`; its keys ascend.
    """

    slices: list[slice]
    contexts: Tensor  # (C,) int64 keys
    pairs: Tensor  # (J,) int64, ascending: index of the context * V + token
    counts: Tensor  # (J,) int32
    statistics: Tensor  # (C + 1, 4) float32
    discounts: Tensor  # (orders, 4) of counts 0, 1, 2, and more

    def __init__(self, orders: int) -> None:
        super().__init__()
        # no arithmetic: for tensors without memory PyTorch would import its compiler, which takes a second
        nothing = torch.zeros(0, dtype=torch.int64)
        self.set(
            [0] * orders,
            contexts=nothing,
            pairs=nothing,
            counts=torch.zeros(0, dtype=torch.int32),
            statistics=torch.zeros(1, STATISTICS),
            discounts=torch.zeros(orders, 4),
        )

    def __deepcopy__(self, memo: Any) -> _Table:
        return self  # copies of a model share the counts, which never change

    def set(self, sizes: Sequence[int], **tensors: Tensor) -> None:
        """Keep the tensors as buffers, which move with the model and are not saved with its weights; `sizes` are the
        numbers of contexts of each order."""
        ends = [sum(sizes[:order]) for order in range(len(sizes) + 1)]
        self.slices = [slice(*borders) for borders in pairwise(ends)]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def find(self, keys: Sequence[Tensor]) -> Tensor:
        """Return the index (N, orders) of the context with each order's key (N,); C for a context that is not there."""
        found = []
        for part, wanted in zip(self.slices, keys, strict=True):
            index, there = _find(self.contexts[part], wanted)
            found.append(torch.where(there, index + part.start, len(self.contexts)))
        return torch.stack(found, 1)

    def count(self, context: Tensor, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return how often tokens (N, 1) or (N, orders), of `size` kinds, were counted in contexts (N, orders), and the
        index of each pair, which is arbitrary where the count is 0."""
        pair, there = _find(self.pairs, context * size + tokens)
        return torch.where(there, self.counts[pair], 0) if len(self.counts) else torch.zeros_like(pair), pair


class NgramMixture(nn.Module):
    """The counts of one direction, the weights of recent tokens, and the gate that mixes both with the network.

    Counts are not weights: `count_ngrams` makes them once from the training text, and a run keeps them in a file.

    Args:
        order: the number K + 1 of tokens in the longest n-grams that are counted; None: none are.
        recent_tokens: R; None: the recent tokens are not mixed in.
        vocab_size: V.
        size: P, the size of the states that the gate reads.

    """

    unigram: Tensor  # (V,)

    def __init__(self, order: int | None, recent_tokens: int | None, vocab_size: int, size: int) -> None:
        super().__init__()
        self.vocab_size, self.context_size = vocab_size, (order or 1) - 1  # K
        self.recent = None if recent_tokens is None else RecentTokens(recent_tokens, vocab_size)
        features = STATISTICS * self.context_size + (0 if self.recent is None else self.recent.features)
        self.of_state = nn.Linear(size, GATE_SIZE)
        self.of_counts = nn.Linear(features, GATE_SIZE, bias=False)
        self.weights = nn.Linear(GATE_SIZE, 1 + self.context_size + (self.recent is not None))
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        self.table = _Table(self.context_size)
        self.columns: _Table | None = None  # of what each column of a stream alone has counted
        self.register_buffer("unigram", torch.full((vocab_size,), 1 / vocab_size), persistent=False)

    def load_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Take the counts that `count_ngrams` returned for the order of this mixture."""
        size, device = self.vocab_size, self.of_state.weight.device
        _, tokens, occurrences = self._parts(counts, 1)  # order 1 has one context, so its pairs are tokens
        self.unigram = _unigram(tokens, occurrences, size)
        orders = [self._parts(counts, number) for number in range(2, self.context_size + 2)]
        sizes = [len(contexts) for contexts, _, _ in orders]
        pairs = [own_pairs + sum(sizes[:order]) * size for order, (_, own_pairs, _) in enumerate(orders)]
        every = torch.cat(pairs)
        found = torch.cat([own_counts for _, _, own_counts in orders])
        discounts = torch.stack([_discounts(own_counts) for _, _, own_counts in orders])
        lengths = torch.tensor([len(own_pairs) for own_pairs in pairs], device=device)
        order = torch.repeat_interleave(lengths, output_size=len(every))  # of each pair
        discount = _at(discounts[order], found)
        numbers = torch.stack([found.float(), discount, torch.ones_like(discount), (found == 1).float()], 1)
        self.table.set(
            sizes,
            contexts=torch.cat([contexts for contexts, _, _ in orders]),
            pairs=every,
            counts=found,
            statistics=torch.zeros(sum(sizes) + 1, STATISTICS, device=device).index_add_(0, every // size, numbers),
            discounts=discounts,
        )

    def load_columns(self, counts: Mapping[str, Tensor], first_column: int = 0) -> None:
        """Take what `count_ngrams` counted by column of a stream, after `load_counts`: training excludes an event's
        whole column from then on. Events name their column as counted from `first_column`."""
        self.first_column, device = first_column, self.of_state.weight.device
        orders = [self._parts(counts, number) for number in range(2, self.context_size + 2)]
        sizes = [len(contexts) for contexts, _, _ in orders]
        every, numbers = list[Tensor](), list[Tensor]()
        for order, (_, own_pairs, own_counts) in enumerate(orders):
            part = self.table.slices[order]
            first, end = (int(each) for each in self._first_pairs([part.start, part.stop]))
            context, pair = own_pairs // (end - first) + sum(sizes[:order]), own_pairs % (end - first) + first
            every.append(context * len(self.table.pairs) + pair)
            before = self.table.counts[pair]
            numbers.append(_lost(before, before - own_counts, self.table.discounts[order].expand(len(pair), -1)))
        context = torch.cat(every) // len(self.table.pairs)
        statistics = torch.zeros(sum(sizes) + 1, STATISTICS, device=device)
        self.columns = _Table(self.context_size)
        self.columns.set(
            sizes,
            contexts=torch.cat([contexts for contexts, _, _ in orders]),
            pairs=torch.cat(every),
            counts=torch.cat([own_counts for _, _, own_counts in orders]),
            statistics=statistics.index_add_(0, context, torch.cat(numbers)),
        )

    def _parts(self, counts: Mapping[str, Tensor], order: int) -> list[Tensor]:
        return [counts[f"{order}.{name}"].to(self.of_state.weight.device) for name in PARTS]

    def _first_pairs(self, contexts: Any) -> Tensor:
        """The index of the first pair of contexts (any shape)."""
        wanted = torch.as_tensor(contexts, device=self.table.pairs.device) * self.vocab_size
        return torch.searchsorted(self.table.pairs, wanted)

    def mix(self, states: Tensor, history: History, targets: Tensor, columns: Tensor | None = None) -> Mixture:
        """Return the estimates for each target, and the weights of the mixture.

        Args:
            states: (N, P), outside autograd's graph: the gate learns from them, but they do not learn from the gate.
            history: of the events, K tokens or more, and no fewer than R - 1 before the first of them.
            targets: (N,).
            columns: in training, the column of a stream (N,) that holds each event, from which nothing is counted if
                `load_columns` was called; else each event is left out of the counts. None: exclude nothing.
        """
        estimates, features = list[Tensor](), list[Tensor]()
        if self.context_size:
            own, statistics = self._of_targets(history.last(self.context_size), targets, columns)
            left, p = _left(statistics), self.unigram[targets]
            for order in range(self.context_size):
                p = own[:, order] + left[:, order] * p
                estimates.append(p)
            features.append(_features(statistics, left))
        if self.recent is not None:
            of_targets, of_recent = self.recent.estimate(history, targets)
            estimates.append(of_targets)
            features.append(of_recent)
        return Mixture(self._gate(states, features), torch.stack(estimates, 1).log())

    def _of_targets(self, history: Tensor, targets: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `mix` finds in the counts for a history (N, K): the part of each order's estimate (N, K) that the order
        itself adds, and the statistics of the contexts (N, K, 4)."""
        keys, context, statistics = self._look_up(history)
        count, pair = self.table.count(context, targets.unsqueeze(1), self.vocab_size)  # (N, K) each
        if columns is not None and self.columns is not None:
            of_column = self.columns.find([column_keys(key, columns + self.first_column) for key in keys])
            statistics = statistics + self.columns.statistics[of_column]
            own, _ = self.columns.count(of_column, pair, len(self.table.pairs))
            count = torch.where(count > 0, count - own, 0)
        elif columns is not None:
            before, excluded = count, list[Tensor]()
            alone = torch.ones_like(targets, dtype=torch.bool)  # is this event the only one of the longer n-gram?
            for order in range(self.context_size - 1, -1, -1):
                excluded.insert(0, alone & (before[:, order] > 0))
                alone = alone & (before[:, order] <= 1)
            count = before - torch.stack(excluded, 1).to(before.dtype)
            statistics = statistics + _lost(before, count, self.table.discounts.expand(*count.shape, -1))
        discounted = count - _at(self.table.discounts.expand(*count.shape, -1), count)
        return discounted / statistics[..., 0].clamp(min=1), statistics

    def log_probabilities(self, states: Tensor, history: History, network: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (N, V) of every token.

        Args:
            states, history: as in `mix`.
            network: (N, V) log-probabilities of the network.
        """
        estimates, features = [network], list[Tensor]()
        if self.context_size:
            _, context, statistics = self._look_up(history.last(self.context_size))
            left, p = _left(statistics), self.unigram.expand_as(network)
            for order in range(self.context_size):
                p = p * left[:, order : order + 1]
                row, token, count = self._followers(context[:, order])
                own = (count - self.table.discounts[order][count.clamp(max=3).long()]) / statistics[row, order, 0]
                p.view(-1).index_add_(0, row * self.vocab_size + token, own.to(p.dtype))
                estimates.append(p.log())
            features.append(_features(statistics, left))
        if self.recent is not None:
            of_every, of_recent = self.recent.estimates(history.last(self.recent.size))
            estimates.append(of_every.log())
            features.append(of_recent)
        log_weights = self._gate(states, features)
        return torch.logsumexp(torch.stack(estimates, 1) + log_weights.unsqueeze(2), 1)

    def _followers(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of contexts (N,): each one's row in 0 .. N - 1, its token, its count, (pairs,) each."""
        first = self._first_pairs(context)
        sizes = self._first_pairs(context + 1) - first
        row = torch.repeat_interleave(sizes)
        pair = torch.arange(len(row), device=row.device) + (first - sizes.cumsum(0) + sizes)[row]
        return row, self.table.pairs[pair] % self.vocab_size, self.table.counts[pair]

    def _look_up(self, history: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The key (N,) of each order from 2 up, the indices (N, K) and the statistics (N, K, 4) of the contexts."""
        keys = list(context_keys(history))[1:]
        context = self.table.find(keys)
        return keys, context, self.table.statistics[context]

    def _gate(self, states: Tensor, features: list[Tensor]) -> Tensor:
        """Logarithms (N, 1 + estimates) of the mixture's weights, from states (N, P) and features (N, any)."""
        with torch.autocast(states.device.type, enabled=False):
            inputs = torch.cat(features, 1).to(self.of_counts.weight.dtype)
            hidden = torch.tanh(self.of_state(states.to(inputs.dtype)) + self.of_counts(inputs))
            return torch.log_softmax(self.weights(hidden), -1)


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each wanted key (any shape) in ascending `keys`, and whether it is there."""
    if not len(keys):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    index = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return index, keys[index] == wanted


def _at(discounts: Tensor, counts: Tensor) -> Tensor:
    """The discount of each count (any shape), from those of counts 0, 1, 2, and more in the last dimension."""
    return discounts.gather(-1, counts.clamp(max=3).long().unsqueeze(-1)).squeeze(-1)


def _lost(before: Tensor, after: Tensor, discounts: Tensor) -> Tensor:
    """What is to be added to the statistics (.., 4) of a context of which a count falls."""
    changes = [
        after - before,
        _at(discounts, after) - _at(discounts, before),
        (after > 0).int() - (before > 0).int(),
        (after == 1).int() - (before == 1).int(),
    ]
    return torch.stack([change.float() for change in changes], -1)


def _left(statistics: Tensor) -> Tensor:
    """The weight (N, K) of the shorter context's estimate: the discounted part, or 1 for an unseen context."""
    total, discounted = statistics[..., 0], statistics[..., 1]
    return torch.where(total > 0, discounted / total.clamp(min=1), 1.0)


def _features(statistics: Tensor, left: Tensor) -> Tensor:
    """What the gate sees of the contexts, (N, 4 * K); it does not depend on the target."""
    total, types_and_singles = statistics[..., :1].log1p(), statistics[..., 2:].log1p()
    return torch.cat([total, left.unsqueeze(-1), types_and_singles], -1).flatten(1)


def _discounts(counts: Tensor) -> Tensor:
    """The discounts (4,) of counts 0, 1, 2, and more, from how many counts (J,) are 1, 2, 3 and 4."""
    if not len(counts):
        return torch.zeros(4, device=counts.device)
    ones, twos, threes, fours = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    share = ones / max(1, ones + 2 * twos)
    estimates = (
        number - (number + 1) * share * more / max(1, fewer)
        for number, fewer, more in ((1, ones, twos), (2, twos, threes), (3, threes, fours))
    )
    least_most = ((0.05, 0.95), (0.05, 1.9), (0.05, 2.85))  # a text of few n-grams gives odd estimates
    discounts = [min(most, max(least, each)) for each, (least, most) in zip(estimates, least_most, strict=True)]
    return torch.tensor([0.0, *discounts], device=counts.device)


def _unigram(tokens: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """The estimate (V,) of order 1 from the counts (J,) of tokens (J,)."""
    if not len(tokens):
        return torch.full((vocab_size,), 1 / vocab_size, device=tokens.device)
    discount = _at(_discounts(counts).expand(len(counts), -1), counts)
    even = torch.full((vocab_size,), 1 / vocab_size, device=tokens.device) * discount.sum() / counts.sum()
    return even.index_add(0, tokens, (counts - discount) / counts.sum())
