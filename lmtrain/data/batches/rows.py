"""From stored sequences to padded, length-sorted batches.

Shapes: B rows, L longest row. A row is a stretch of a stored sequence `<bos> t1 .. tn <eos>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data.arrays import Ints


class Batch(NamedTuple):
    """Padded rows, longest first, as `pack_padded_sequence` expects them."""

    tokens: Tensor  # (L, B) int64; the pad id after a row's end
    lengths: Tensor  # (B,) int64 on CPU, non-increasing, >= 1
    order: Tensor  # (B,) place of each row in the caller's order: rows[order[b]] stands in column b


class Sequences(Protocol):
    """Flat ids and where each sequence begins, as the token store holds them."""

    tokens: NDArray[np.unsignedinteger]  # (T,)
    offsets: NDArray[np.uint64]  # (sequences + 1,)


def make_batch(rows: Sequence[Sequence[int] | Ints], pad_id: int) -> Batch:
    """Pad rows of ids, each of length >= 1, and sort them longest first; equal lengths keep their order."""
    lengths = np.array([len(row) for row in rows], np.int64)
    flat = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return gather_batch(flat, lengths.cumsum() - lengths, lengths, pad_id)


def gather_batch(flat: NDArray[np.integer], starts: Ints, lengths: Ints, pad_id: int) -> Batch:
    """The batch of flat[start : start + length] for each row, without a loop over rows or tokens."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    steps = np.arange(lengths[0])[:, None]  # (L, 1)
    real = steps < lengths  # (L, B)
    tokens = np.full(real.shape, pad_id, np.int64)
    tokens[real] = flat[(starts + steps)[real]]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(order))


def count_rows(lengths: Ints, max_length: int) -> Ints:
    """How many rows each sequence gives, from its tokens with `<bos>` and `<eos>`.

    Args:
        max_length: tokens in a row, `<bos>` and `<eos>` not counted.
    """
    if lengths.max(initial=0) <= max_length + 2:
        return np.ones_like(lengths)
    return np.maximum(1, -(-(lengths - 1) // (max_length + 1)))  # a row of k tokens has k - 1 events


def cut_rows(offsets: NDArray[np.integer], max_length: int) -> tuple[Ints, Ints]:
    """Where the rows of consecutive sequences begin and how many tokens they have.

    Neighbouring rows of a cut sequence share one token, the last one read by the first and the first one read by the
    second. So every token is still predicted exactly once by each direction; only the context is shorter.

    Args:
        offsets: (sequences + 1,) where each sequence begins, and the last one ends.
    """
    places = offsets.astype(np.int64, copy=False)
    starts, lengths = places[:-1], np.diff(places)
    rows = count_rows(lengths, max_length)
    if (count := int(rows.sum())) == len(rows):
        return starts, lengths
    skipped = (np.arange(count) - np.repeat(rows.cumsum() - rows, rows)) * (max_length + 1)
    return np.repeat(starts, rows) + skipped, np.minimum(np.repeat(lengths, rows) - skipped, max_length + 2)


class Rows:
    """The rows of a corpus, all of them in memory: its sequences, those of more than `max_length` tokens cut.

    Attributes:
        starts, row_lengths: (rows,) as `cut_rows` has them.
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self.flat = sequences.tokens
        self.starts, self.row_lengths = cut_rows(sequences.offsets, max_length)
        self.split_sequences = int((np.diff(sequences.offsets) > max_length + 2).sum())

    def __len__(self) -> int:
        return len(self.row_lengths)

    def batch(self, indices: Ints, pad_id: int) -> Batch:
        """The rows of the given indices as a batch."""
        return gather_batch(self.flat, self.starts[indices], self.row_lengths[indices], pad_id)

    def lengths(self, indices: Ints) -> Ints:
        """Tokens of each of these rows."""
        return self.row_lengths[indices]

    def take(self, indices: Ints, places: Ints) -> Ints:
        """Of these rows the ones at some places."""
        return indices[places]


def narrow(numbers: Ints) -> NDArray[np.integer]:
    """Numbers >= 0 in 16 bits where they fit: those are sorted by counting them, ten times as fast."""
    return numbers.astype(np.uint16) if numbers.max(initial=0) < 1 << 16 else numbers


def longest_first(lengths: Ints) -> Ints:
    """The places of rows, the longest first, equal lengths in their order."""
    return np.argsort(narrow(lengths.max(initial=0) - lengths), kind="stable")


def cut_batches(
    sorted_lengths: NDArray[np.integer], batch_size: int | None, max_tokens: int | None
) -> list[tuple[int, int]]:
    """Cut rows that are sorted longest first into (start, end) of batches of at most `batch_size` rows or at most
    `max_tokens` padded tokens; a row that is longer than `max_tokens` by itself is a batch of its own."""
    cuts, start = [], 0
    while start < len(sorted_lengths):
        size = batch_size or max(1, (max_tokens or 1) // int(sorted_lengths[start]))
        cuts.append((start, min(start + size, len(sorted_lengths))))
        start += size
    return cuts


def sorted_parts(lengths: Ints, max_tokens: int, batch_size: int | None = None) -> Iterator[Ints]:
    """The rows of each batch; each row once, longest first: the cheapest order where order does not matter."""
    order = longest_first(lengths)
    for start, end in cut_batches(lengths[order], batch_size, max_tokens):
        yield order[start:end]
