"""N-grams counted in the training text, and their mixture with what the network says.

Shapes: N events, H tokens of history, V vocabulary, O orders, C contexts and P pairs of one order.

What a network learns of a small text in minutes, counting knows after one look. Of each order n there is the estimate

    p_n(token | context) = max(count - d, 0) / total + (d * types / total) * p_(n-1)(token | shorter context)

with the context's own counts and one discount d an order (absolute discounting, interpolated: Ney, Essen and Kneser
1994, https://doi.org/10.1006/csla.1994.1001); p_0 is 1 / V. A small gate mixes these with the network's probability, by
how often a context was seen and by the network's state. Each of them sums to one over the vocabulary, and so does the
mixture.

In training an event is left out of the counts that predict it, all others left in: else the gate would trust contexts
that were seen once, by which every event of the text itself is certain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

LARGEST_TOKENS = 1 << 24  # that are counted: that takes some 200 bytes a token, half of it until all is counted
PARTS = ("contexts", "pairs", "counts")  # of an order, as `count_ngrams` makes and `CountedNgrams.put` takes them
HIDDEN = 64  # of the gate
LEAST_DISCOUNT, MOST_DISCOUNT = 0.05, 0.95
FACTOR, SHIFT = -7046029254386353131, 29  # 2**64 / golden ratio; products of int64 wrap


class Mixed(NamedTuple):
    """What the gate mixes for N events."""

    shares: Tensor  # (N, O) logarithms: of the network, then of the orders from 2 up
    counted: Tensor  # (N, O - 1) logarithms of the target's probability by each order from 2 up


class _Order(nn.Module):
    """The counts of one order: contexts by their keys, and under each the tokens that followed it."""

    contexts: Tensor  # (C,) int64, ascending
    pairs: Tensor  # (P,) int64, ascending: place of the context * V + token
    counts: Tensor  # (P,) int32
    totals: Tensor  # (C,) int64: the sum of a context's counts
    types: Tensor  # (C,) how many tokens followed it
    singles: Tensor  # (C,) and how many of them once

    def __init__(self) -> None:
        super().__init__()
        nothing = torch.zeros(1, dtype=torch.int64)  # one context that was never seen, until `put`
        for name in ("contexts", "totals", "types", "singles"):
            self.register_buffer(name, nothing, persistent=False)
        self.register_buffer("pairs", nothing - 1, persistent=False)
        self.register_buffer("counts", nothing.int(), persistent=False)
        self.discount = MOST_DISCOUNT

    def __deepcopy__(self, memo: Any) -> _Order:
        return self  # nothing ever changes it

    def put(self, contexts: Tensor, pairs: Tensor, counts: Tensor, vocab_size: int) -> None:
        """Take up counts, and work out what is asked of them."""
        self.contexts, self.pairs, self.counts = contexts, pairs, counts
        place, size = pairs // vocab_size, len(contexts)
        self.types = torch.bincount(place, minlength=size)
        self.singles = torch.bincount(place[counts == 1], minlength=size)
        self.totals = torch.zeros(size, dtype=torch.int64, device=place.device).index_add_(0, place, counts.long())
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else LEAST_DISCOUNT
        self.discount = min(MOST_DISCOUNT, max(LEAST_DISCOUNT, discount))

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each context (N,), any where it was never seen, and whether it was."""
        return _find(self.contexts, keys)

    def seen(self, place: Tensor, found: Tensor) -> _Seen:
        """How often contexts (N,) were seen."""
        return _Seen(*(torch.where(found, part[place], 0) for part in (self.totals, self.types, self.singles)))

    def times(self, place: Tensor, found: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        """How often targets (N,) followed these contexts."""
        at, there = _find(self.pairs, place * vocab_size + targets)
        return torch.where(found & there, self.counts[at].long(), 0)

    def followers(self, place: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of contexts (N,) that were seen: row, token and count of all that followed them, (F,) each."""
        first = torch.searchsorted(self.pairs, place * vocab_size)
        sizes = torch.searchsorted(self.pairs, (place + 1) * vocab_size) - first
        row = torch.repeat_interleave(torch.arange(len(place), device=place.device), sizes)
        at = torch.arange(len(row), device=place.device) + (first - sizes.cumsum(0) + sizes)[row]
        return row, self.pairs[at] % vocab_size, self.counts[at]


class _Seen(NamedTuple):
    """Of N contexts, as `_Order` has it; all (N,)."""

    total: Tensor
    types: Tensor
    singles: Tensor

    def without(self, times: Tensor) -> _Seen:
        """The same but for one event, whose target followed the context so many times (N,), 0 where it never did."""
        counted, once, twice = (times > 0).long(), (times == 1).long(), (times == 2).long()
        return _Seen(self.total - counted, self.types - once, self.singles - once + twice)


class CountedNgrams(nn.Module):
    """The counts of one direction, and the gate that mixes them with the network.

    Counts are no weights: `count_ngrams` makes them once, from the training text, and a run keeps them in a file of
    their own.

    Args:
        order: O, tokens of the longest n-grams.
        vocab_size: V.
        size: P of the states that the gate reads.
    """

    def __init__(self, order: int, vocab_size: int, size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.history = order - 1  # H
        self.orders = nn.ModuleList(_Order() for _ in range(order))
        self.of_state = nn.Linear(size, HIDDEN)
        self.of_counts = nn.Linear(4 * (order - 1), HIDDEN, bias=False)
        self.shares = nn.Linear(HIDDEN, order)
        nn.init.zeros_(self.shares.weight)
        nn.init.zeros_(self.shares.bias)

    def put(self, counts: Mapping[str, Tensor]) -> None:
        """Take up what `count_ngrams` made, or a file keeps."""
        device = self.shares.weight.device
        for number, order in enumerate(self._orders, 1):
            contexts, pairs, own = (counts[f"{number}.{name}"].to(device) for name in PARTS)
            order.put(contexts, pairs, own, self.vocab_size)

    @property
    def _orders(self) -> list[_Order]:
        return cast(list[_Order], list(self.orders))

    def mix(self, states: Tensor, history: Tensor, targets: Tensor, left_out: bool = False) -> Mixed:
        """What is mixed for each target.

        Args:
            states: (N, P), outside the graph: the gate learns from them, and not they from the gate.
            history: (N, H) ids + 1 of the last tokens read, the last one last; 0 where there was none.
            targets: (N,).
            left_out: these events were counted, and each does not count for itself.
        """
        p = torch.full(targets.shape, 1 / self.vocab_size, device=targets.device)
        estimates, features = list[Tensor](), list[Tensor]()
        for number, (order, keys) in enumerate(zip(self._orders, context_keys(history), strict=True), 1):
            place, found = order.find(keys)
            seen, times = order.seen(place, found), order.times(place, found, targets, self.vocab_size)
            if left_out:
                seen, times = seen.without(times), (times - 1).clamp(min=0)
            left = _left(order, seen)
            p = (times - order.discount).clamp(min=0) / seen.total.clamp(min=1) + left * p
            if number > 1:
                estimates.append(p)
                features += _features(seen, left)
        return Mixed(self._gate(states, features), torch.stack(estimates, 1).log())

    def log_probabilities(self, states: Tensor, history: Tensor, network: Tensor) -> Tensor:
        """The mixture for every token.

        Args:
            states, history: as `mix`.
            network: (N, V) its log-probabilities.
        """
        p = torch.full_like(network, 1 / self.vocab_size)
        estimates, features = [network], list[Tensor]()
        for number, (order, keys) in enumerate(zip(self._orders, context_keys(history), strict=True), 1):
            place, found = order.find(keys)
            seen = order.seen(place, found)
            left = _left(order, seen)
            p = p * left.unsqueeze(1)
            row, token, count = order.followers(place[found], self.vocab_size)
            row = found.nonzero().squeeze(1)[row]
            p.view(-1).index_add_(0, row * self.vocab_size + token, (count - order.discount) / seen.total[row])
            if number > 1:
                estimates.append(p.log())
                features += _features(seen, left)
        shares = self._gate(states, features)  # (N, O)
        return torch.logsumexp(torch.stack(estimates, 1) + shares.unsqueeze(2), 1)

    def _gate(self, states: Tensor, features: list[Tensor]) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            hidden = torch.tanh(self.of_state(states.float()) + self.of_counts(torch.stack(features, 1)))
            return torch.log_softmax(self.shares(hidden), -1)


def _left(order: _Order, seen: _Seen) -> Tensor:
    """What the discount leaves to the shorter context; all, where this one was never seen."""
    return torch.where(seen.total > 0, order.discount * seen.types / seen.total.clamp(min=1), 1.0)


def _features(seen: _Seen, left: Tensor) -> list[Tensor]:
    """What the gate goes by: nothing of it depends on the target."""
    return [seen.total.float().log1p(), left, seen.types.float().log1p(), seen.singles.float().log1p()]


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ascending `keys`, one at least, each of `wanted` stands, any where it does not, and whether it does."""
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return place, keys[place] == wanted


def context_keys(history: Tensor) -> Iterator[Tensor]:
    """A key (N,) of the last 0, 1 .. H tokens of each history (N, H).

    64 bits: that two of ten million contexts share one has a chance of some 3 in a million, and if they did, their
    probabilities would still sum to one.
    """
    key = torch.zeros(len(history), dtype=torch.int64, device=history.device)
    yield key
    for back in range(1, history.shape[1] + 1):
        mixed = (key ^ (history[:, -back] + back * 2_097_593)) * FACTOR
        key = mixed ^ (mixed >> SHIFT)
        yield key


def count_ngrams(tokens: Tensor, place: Tensor, order: int, vocab_size: int) -> dict[str, Tensor]:
    """Count the n-grams of a text.

    Args:
        tokens: (T,) int64 ids, one sequence behind the other, in the order in which they are read.
        place: (T,) int64 tokens of its sequence before each one; those at place 0 begin one, and are not predicted.
        order: tokens of the longest n-grams, >= 2.

    Returns:
        By `ORDER.contexts` (C,) int64, `ORDER.pairs` (P,) int64 and `ORDER.counts` (P,) int32: what `CountedNgrams.put`
        takes.
    """
    events = place > 0
    targets = tokens[events]
    history = torch.stack(  # from the farthest token to the last
        [torch.where(place >= back, tokens.roll(back) + 1, 0)[events] for back in range(order - 1, 0, -1)], 1
    )
    found: dict[str, Tensor] = {}
    for number, keys in enumerate(context_keys(history), 1):
        contexts, context = torch.unique(keys, return_inverse=True)
        pairs, counts = torch.unique(context * vocab_size + targets, return_counts=True)
        found |= {f"{number}.contexts": contexts, f"{number}.pairs": pairs, f"{number}.counts": counts.int()}
    return found
