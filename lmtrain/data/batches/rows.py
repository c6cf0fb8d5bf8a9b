"""Makes padded batches, sorted by length, from the rows of a corpus.

A row is what the model reads from left to right: a stored sequence `<bos> t1 .. tn <eos>`, or a part of a long one.
Shapes: B rows of a batch, L longest row, R rows of a corpus, T tokens of a corpus.
"""

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
    order: Tensor  # (B,) index of each row in the caller's order: column b holds rows[order[b]]


class Sequences(Protocol):
    """The ids of all sequences, one after the other, and where each sequence begins, as in the token store."""

    tokens: NDArray[np.unsignedinteger]  # (T,)
    offsets: NDArray[np.uint64]  # (sequences + 1,) the last one is T


def make_batch(rows: Sequence[Sequence[int] | Ints], pad_id: int) -> Batch:
    """Return the batch of some rows of ids, each of length >= 1: longest first; equally long rows keep their order."""
    lengths = np.array([len(row) for row in rows], np.int64)
    flat = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return gather_batch(flat, lengths.cumsum() - lengths, lengths, pad_id)


def gather_batch(flat: NDArray[np.integer], starts: Ints, lengths: Ints, pad_id: int) -> Batch:
    """Return the batch of the rows flat[start : start + length], without a loop over rows or tokens.

    `flat` are ids (T,); `starts` and `lengths`, (B,), are in any order.
    """
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    steps = np.arange(lengths[0])[:, None]  # (L, 1)
    real = steps < lengths  # (L, B)
    tokens = np.full(real.shape, pad_id, np.int64)
    tokens[real] = flat[(starts + steps)[real]]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(order))


def count_rows(lengths: Ints, max_length: int) -> Ints:
    """Return how many rows each sequence is cut into, (sequences,), from the tokens of each, (sequences,).

    `max_length` bounds the tokens of a row without `<bos>` and `<eos>`; `lengths` count these two.
    """
    if lengths.max(initial=0) <= max_length + 2:
        return np.ones_like(lengths)
    return np.maximum(1, -(-(lengths - 1) // (max_length + 1)))  # n tokens of a row make n - 1 predictions


def cut_rows(offsets: NDArray[np.integer], max_length: int) -> tuple[Ints, Ints]:
    """Return where the rows of consecutive sequences begin, and how many tokens they have, both (R,).

    Neighbouring rows of a cut sequence have one token in common: the last token of the one is the first token of the
    other. So each direction still predicts every token exactly once; only the context is shorter. For example,
    `<bos> a b c d <eos>` is cut at `max_length` 2 into `<bos> a b c` and `c d <eos>`. `offsets`, (sequences + 1,), say
    where each sequence begins, and where the last one ends.
    """
    borders = offsets.astype(np.int64, copy=False)
    starts, lengths = borders[:-1], np.diff(borders)
    rows = count_rows(lengths, max_length)
    if (count := int(rows.sum())) == len(rows):
        return starts, lengths
    skipped = (np.arange(count) - np.repeat(rows.cumsum() - rows, rows)) * (max_length + 1)
    return np.repeat(starts, rows) + skipped, np.minimum(np.repeat(lengths, rows) - skipped, max_length + 2)


class Rows:
    """The rows of a corpus, with the starts and lengths of all of them in memory.

    Attributes:
        flat: (T,) ids.
        starts, row_lengths: (R,) as `cut_rows` returns them.
        split_sequences: how many sequences are longer than `max_length` and are cut.
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self.flat = sequences.tokens
        self.starts, self.row_lengths = cut_rows(sequences.offsets, max_length)
        self.split_sequences = int((np.diff(sequences.offsets) > max_length + 2).sum())

    def __len__(self) -> int:
        return len(self.row_lengths)

    def batch(self, indices: Ints, pad_id: int) -> Batch:
        """Return the rows with these indices, (B,), as a batch."""
        return gather_batch(self.flat, self.starts[indices], self.row_lengths[indices], pad_id)

    def lengths(self, indices: Ints) -> Ints:
        """Return the tokens of each of these rows, (B,)."""
        return self.row_lengths[indices]

    def take(self, indices: Ints, chosen: Ints) -> Ints:
        """Return `indices[chosen]`, (chosen,): some of these rows (B,)."""
        return indices[chosen]


def narrow(numbers: Ints) -> NDArray[np.integer]:
    """Return numbers >= 0 (any shape) in 16 bits where they fit: NumPy sorts these by counting, ten times as fast."""
    return numbers.astype(np.uint16) if numbers.max(initial=0) < 1 << 16 else numbers


def longest_first(lengths: Ints) -> Ints:
    """Return the indices (R,) that sort rows longest first; equally long rows keep their order."""
    return np.argsort(narrow(lengths.max(initial=0) - lengths), kind="stable")


def cut_batches(
    sorted_lengths: NDArray[np.integer], batch_size: int | None, max_tokens: int | None
) -> list[tuple[int, int]]:
    """Return the (start, end) of the batches of rows with these lengths, (R,), which are sorted longest first.

    A batch has `batch_size` rows or, if that is None, at most `max_tokens` padded tokens, but at least one row.
    """
    cuts, start = [], 0
    while start < len(sorted_lengths):
        size = batch_size or max(1, (max_tokens or 1) // int(sorted_lengths[start]))
        cuts.append((start, min(start + size, len(sorted_lengths))))
        start += size
    return cuts


def sorted_parts(lengths: Ints, max_tokens: int, batch_size: int | None = None) -> Iterator[Ints]:
    """Yield each batch's row indices (B,), longest of `lengths` (R,) first: the cheapest order if any order will do."""
    order = longest_first(lengths)
    for start, end in cut_batches(lengths[order], batch_size, max_tokens):
        yield order[start:end]
