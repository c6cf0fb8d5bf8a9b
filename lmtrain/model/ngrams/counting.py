"""Counts the n-grams of a text for a Kneser-Ney model.

Shapes: C contexts of one order, J pairs (a context and a token that follows it) of one order, K tokens of n-gram
history, N events, T tokens of a text, V vocabulary.

The longest n-grams count how often they occur. A shorter one counts how many different tokens precede it (Kneser and
Ney 1995, https://doi.org/10.1109/ICASSP.1995.479394): a model asks for it where the longer context was not seen, and
there a token that follows many contexts is likelier than one that often follows the same context.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LARGEST_TOKENS = 1 << 24  # tokens of the longest text
COUNTING_BYTES = 350  # memory that counting takes for each token of a stream, about; most of it is free afterwards
PARTS = ("contexts", "pairs", "counts")  # the tensors of one order, which `count_ngrams` returns
FACTOR, SHIFT = -7046029254386353131, 29  # 2**64 / golden ratio; int64 products wrap around


def context_keys(history: Tensor) -> Iterator[Tensor]:
    """Yield keys (N,) int64 of the last 0 tokens of each history (N, K), of its last token, .. of its last K tokens.

    Keys have 64 bits: the chance that two of ten million contexts share one is some 3 in a million, and even then their
    probabilities would sum to one.
    """
    key = torch.zeros(len(history), dtype=torch.int64, device=history.device)
    yield key
    for back in range(1, history.shape[1] + 1):
        key = _mixed(key, history[:, -back] + back * 2_097_593)
        yield key


def column_keys(keys: Tensor, column: Tensor) -> Tensor:
    """Return keys (N,) of contexts (N,) within the columns (N,) of a stream."""
    return _mixed(keys, ~column)


def _mixed(key: Tensor, number: Tensor) -> Tensor:
    mixed = (key ^ number) * FACTOR
    return mixed ^ (mixed >> SHIFT)


def count_ngrams(
    tokens: Tensor, position: Tensor, order: int, vocab_size: int, column: Tensor | None = None
) -> dict[str, Tensor]:
    """Count the n-grams of a text.

    Args:
        tokens: (T,) int64 ids of all sequences one after the other, in the order in which they are read.
        position: (T,) int64 number of tokens before each one in its sequence; those at 0 are not predicted.
        order: number of tokens in the longest n-grams, >= 2.
        column: (T,) int64 the column of a stream in which training reads each token; None: do not count by column.

    Returns:
        `ORDER.contexts` (C,) int64, `ORDER.pairs` (J,) int64 and `ORDER.counts` (J,) int32 for each order: ascending
        keys of contexts; ascending numbers, index of the context * V + token; how often the pair was counted.

        With columns instead, for each order from 2 up, what of these counts comes from one column alone: contexts are
        those of `column_keys`, and pairs are index of the context * J + index of the pair among all pairs.
    """
    events = position > 0
    targets = tokens[events]
    history = torch.stack(  # columns: from the farthest token to the last
        [torch.where(position >= back, tokens.roll(back) + 1, 0)[events] for back in range(order - 1, 0, -1)], 1
    )
    # The events that one order counts. `first` and `last` are the columns in which such an event, or one that is the
    # same to this order, occurs; where they are equal, no other column knows it.
    counted = torch.arange(len(targets))
    first = last = None if column is None else column[events]
    found: dict[str, Tensor] = {}
    for number, keys in reversed(list(enumerate(context_keys(history), 1))):
        contexts, context = torch.unique(keys[counted], return_inverse=True)
        pairs, pair, counts = torch.unique(
            context * vocab_size + targets[counted], return_inverse=True, return_counts=True
        )
        if first is None or last is None:
            found |= _named(number, contexts, pairs, counts)
        elif number > 1:
            alone = first == last
            own_keys = column_keys(keys[counted][alone], first[alone])
            contexts, context = torch.unique(own_keys, return_inverse=True)
            found |= _named(number, contexts, *torch.unique(context * len(pairs) + pair[alone], return_counts=True))
            first, last = _reduced(first, pair, len(pairs), "amin"), _reduced(last, pair, len(pairs), "amax")
        # the next shorter n-grams are counted once for each different longer one
        counted = _reduced(counted, pair, len(pairs), "amin")
    return found


def _named(order: int, contexts: Tensor, pairs: Tensor, counts: Tensor) -> dict[str, Tensor]:
    return {f"{order}.{name}": part for name, part in zip(PARTS, (contexts, pairs, counts.int()), strict=True)}


def _reduced(values: Tensor, group: Tensor, groups: int, how: str) -> Tensor:
    """The least (`amin`) or greatest (`amax`) of the values (N,) in each group, (groups,); no group is empty."""
    return values.new_zeros(groups).scatter_reduce_(0, group, values, how, include_self=False)
