"""N-grams counted in the training text, and their mixture with the network's probabilities.

Shapes: C contexts of one order, J pairs (a context and a token that follows it) of one order, K tokens of n-gram
history, N events, O orders, P output size, T tokens of a text, V vocabulary.

Counting learns in one pass over a small text what a network learns in minutes. For each order n, the estimate is

    p_n(token | context) = max(count - d, 0) / total + (d * types / total) * p_(n-1)(token | shorter context)

with the context's own counts and one discount d for each order (absolute discounting, interpolated: Ney, Essen and
Kneser 1994, https://doi.org/10.1006/csla.1994.1001); p_0 is 1 / V. A small network, the gate, weighs the estimates and
the language model's probability by how often a context was seen and by the model's state. Each of them sums to one over
the vocabulary, and so does the mixture.

In training, the counts that predict an event exclude that one event, and no other. Otherwise the gate would trust
contexts that were seen once, which make every event of the training text certain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

LARGEST_TOKENS = 1 << 24  # tokens of the longest text
COUNTING_BYTES = 200  # memory that counting takes for each token, about; most of it is free afterwards
PARTS = ("contexts", "pairs", "counts")  # the tensors of one order, which `count_ngrams` returns
GATE_SIZE = 64  # size of the gate's hidden layer
LEAST_DISCOUNT, MOST_DISCOUNT = 0.05, 0.95
FACTOR, SHIFT = -7046029254386353131, 29  # 2**64 / golden ratio; int64 products wrap around


class Mixture(NamedTuple):
    """Logarithms of a mixture's parts for N events."""

    log_weights: Tensor  # (N, O) weights of the network, then of each order from 2 up
    log_estimates: Tensor  # (N, O - 1) the target's probability by each order from 2 up


class _Order(nn.Module):
    """The counts of one order: contexts by their keys, and for each context the tokens that followed it."""

    contexts: Tensor  # (C,) int64 keys, ascending
    pairs: Tensor  # (J,) int64, ascending: index of the context in `contexts` * V + token
    counts: Tensor  # (J,) int32
    totals: Tensor  # (C,) int64 sum of a context's counts
    types: Tensor  # (C,) int64 number of different tokens that followed it
    singles: Tensor  # (C,) int64 number of tokens that followed it exactly once

    def __init__(self) -> None:
        super().__init__()
        nothing = torch.zeros(1, dtype=torch.int64)  # one context that was never seen
        for name in ("contexts", "totals", "types", "singles"):
            self.register_buffer(name, nothing, persistent=False)
        self.register_buffer("pairs", nothing - 1, persistent=False)
        self.register_buffer("counts", nothing.int(), persistent=False)
        self.discount = MOST_DISCOUNT

    def __deepcopy__(self, memo: Any) -> _Order:
        return self  # copies of a model share the counts, which never change

    def load_counts(self, vocab_size: int, contexts: Tensor, pairs: Tensor, counts: Tensor) -> None:
        """Take the counts, (C,), (J,) and (J,), and compute from them what the estimates need."""
        self.contexts, self.pairs, self.counts = contexts, pairs, counts
        context, size = pairs // vocab_size, len(contexts)
        self.types = torch.bincount(context, minlength=size)
        self.singles = torch.bincount(context[counts == 1], minlength=size)
        self.totals = torch.zeros(size, dtype=torch.int64, device=context.device).index_add_(0, context, counts.long())
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else LEAST_DISCOUNT
        self.discount = min(MOST_DISCOUNT, max(LEAST_DISCOUNT, discount))

    def find_contexts(self, keys: Tensor) -> tuple[Tensor, Tensor, _Statistics]:
        """Return each context's index (N,), arbitrary if it was not seen; whether it was seen (N,); its statistics."""
        context, seen = _find(self.contexts, keys)
        counted = (torch.where(seen, part[context], 0) for part in (self.totals, self.types, self.singles))
        return context, seen, _Statistics(*counted)

    def target_counts(self, context: Tensor, seen: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        """Return how often targets (N,) followed the contexts that `find_contexts` found, (N,)."""
        pair, counted = _find(self.pairs, context * vocab_size + targets)
        return torch.where(seen & counted, self.counts[pair].long(), 0)

    def followers(self, context: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs of seen contexts (N,): each one's row in 0 .. N - 1, its token, its count, (pairs,) each."""
        first = torch.searchsorted(self.pairs, context * vocab_size)
        sizes = torch.searchsorted(self.pairs, (context + 1) * vocab_size) - first
        row = torch.repeat_interleave(torch.arange(len(context), device=context.device), sizes)
        pair = torch.arange(len(row), device=context.device) + (first - sizes.cumsum(0) + sizes)[row]
        return row, self.pairs[pair] % vocab_size, self.counts[pair]


class _Statistics(NamedTuple):
    """The statistics of N contexts in one order, (N,) int64 each; `_Order` explains the fields."""

    total: Tensor
    types: Tensor
    singles: Tensor

    def without_event(self, target_counts: Tensor) -> _Statistics:
        """Exclude one event for each context; its target followed the context `target_counts` (N,) times."""
        counted, once, twice = (target_counts > 0).long(), (target_counts == 1).long(), (target_counts == 2).long()
        return _Statistics(self.total - counted, self.types - once, self.singles - once + twice)


class CountedNgrams(nn.Module):
    """The counts of one direction, and the gate that mixes them with the network.

    Counts are not weights: `count_ngrams` makes them once from the training text, and a run keeps them in a file.

    Args:
        order, vocab_size: O, the number of tokens in the longest n-grams; V.
        size: P, the size of the states that the gate reads.
    """

    def __init__(self, order: int, vocab_size: int, size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.history_size = order - 1  # K
        self.orders = nn.ModuleList(_Order() for _ in range(order))
        self.of_state = nn.Linear(size, GATE_SIZE)
        self.of_counts = nn.Linear(4 * (order - 1), GATE_SIZE, bias=False)
        self.shares = nn.Linear(GATE_SIZE, order)  # the gate's last layer, under its name in checkpoints
        nn.init.zeros_(self.shares.weight)
        nn.init.zeros_(self.shares.bias)

    def load_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Take the counts that `count_ngrams` returned."""
        device = self.shares.weight.device
        for number, order in enumerate(self._orders, 1):
            order.load_counts(self.vocab_size, *(counts[f"{number}.{name}"].to(device) for name in PARTS))

    @property
    def _orders(self) -> list[_Order]:
        return cast(list[_Order], list(self.orders))

    def mix(self, states: Tensor, history: Tensor, targets: Tensor, exclude_event: bool = False) -> Mixture:
        """Return the estimates for each target, and the weights of the mixture.

        Args:
            states: (N, P), outside autograd's graph: the gate learns from them, but they do not learn from the gate.
            history: (N, K) ids + 1 of the last tokens read, the last one last; 0 where there was none.
            targets: (N,).
            exclude_event: these events were counted; predict each one from the counts of all others.
        """
        p = torch.full(targets.shape, 1 / self.vocab_size, device=targets.device)
        estimates, features = list[Tensor](), list[Tensor]()
        for number, (order, keys) in enumerate(zip(self._orders, context_keys(history), strict=True), 1):
            context, seen, statistics = order.find_contexts(keys)
            target_counts = order.target_counts(context, seen, targets, self.vocab_size)
            if exclude_event:
                statistics = statistics.without_event(target_counts)
                target_counts = (target_counts - 1).clamp(min=0)
            backoff = _backoff(order, statistics)
            p = (target_counts - order.discount).clamp(min=0) / statistics.total.clamp(min=1) + backoff * p
            if number > 1:
                estimates.append(p)
                features += _features(statistics, backoff)
        return Mixture(self._gate(states, features), torch.stack(estimates, 1).log())

    def log_probabilities(self, states: Tensor, history: Tensor, network: Tensor) -> Tensor:
        """Return the mixture's log-probabilities (N, V) of every token.

        Args:
            states, history: as in `mix`.
            network: (N, V) log-probabilities of the network.
        """
        p = torch.full_like(network, 1 / self.vocab_size)
        estimates, features = [network], list[Tensor]()
        for number, (order, keys) in enumerate(zip(self._orders, context_keys(history), strict=True), 1):
            context, seen, statistics = order.find_contexts(keys)
            backoff = _backoff(order, statistics)
            p = p * backoff.unsqueeze(1)
            row, token, count = order.followers(context[seen], self.vocab_size)
            row = seen.nonzero().squeeze(1)[row]
            p.view(-1).index_add_(0, row * self.vocab_size + token, (count - order.discount) / statistics.total[row])
            if number > 1:
                estimates.append(p.log())
                features += _features(statistics, backoff)
        log_weights = self._gate(states, features)
        return torch.logsumexp(torch.stack(estimates, 1) + log_weights.unsqueeze(2), 1)

    def _gate(self, states: Tensor, features: list[Tensor]) -> Tensor:
        """Logarithms (N, O) of the mixture's weights, from states (N, P) and 4 * (O - 1) features (N,)."""
        with torch.autocast(states.device.type, enabled=False):
            hidden = torch.tanh(self.of_state(states.float()) + self.of_counts(torch.stack(features, 1)))
            return torch.log_softmax(self.shares(hidden), -1)


def _backoff(order: _Order, statistics: _Statistics) -> Tensor:
    """The weight (N,) of the shorter context's estimate: the discounted part, or 1 for an unseen context."""
    weight = order.discount * statistics.types / statistics.total.clamp(min=1)
    return torch.where(statistics.total > 0, weight, 1.0)


def _features(statistics: _Statistics, backoff: Tensor) -> list[Tensor]:
    """The inputs of the gate from one order, (N,) each; they do not depend on the target."""
    total, types, singles = (part.float().log1p() for part in statistics)
    return [total, backoff, types, singles]


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each wanted key (N,) in ascending, non-empty `keys`, and whether it is there, (N,)."""
    index = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return index, keys[index] == wanted


def context_keys(history: Tensor) -> Iterator[Tensor]:
    """Yield keys (N,) int64 of the last 0 tokens of each history (N, K), of its last token, .. of its last K tokens.

    Keys have 64 bits: the chance that two of ten million contexts share one is some 3 in a million, and even then their
    probabilities would sum to one.
    """
    key = torch.zeros(len(history), dtype=torch.int64, device=history.device)
    yield key
    for back in range(1, history.shape[1] + 1):
        mixed = (key ^ (history[:, -back] + back * 2_097_593)) * FACTOR
        key = mixed ^ (mixed >> SHIFT)
        yield key


def count_ngrams(tokens: Tensor, position: Tensor, order: int, vocab_size: int) -> dict[str, Tensor]:
    """Count the n-grams of a text.

    Args:
        tokens: (T,) int64 ids of all sequences one after the other, in the order in which they are read.
        position: (T,) int64 number of tokens before each one in its sequence; those at 0 are not predicted.
        order: number of tokens in the longest n-grams, >= 2.

    Returns:
        `ORDER.contexts` (C,) int64, `ORDER.pairs` (J,) int64 and `ORDER.counts` (J,) int32 for each order.
    """
    events = position > 0
    targets = tokens[events]
    history = torch.stack(  # columns: from the farthest token to the last
        [torch.where(position >= back, tokens.roll(back) + 1, 0)[events] for back in range(order - 1, 0, -1)], 1
    )
    counted: dict[str, Tensor] = {}
    for number, keys in enumerate(context_keys(history), 1):
        contexts, context = torch.unique(keys, return_inverse=True)
        pairs, counts = torch.unique(context * vocab_size + targets, return_counts=True)
        counted |= {f"{number}.contexts": contexts, f"{number}.pairs": pairs, f"{number}.counts": counts.int()}
    return counted
