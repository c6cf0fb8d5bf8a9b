"""From stored sequences to padded, length-sorted batches, in an order that can be resumed in O(1).

Shapes: B rows, L longest row. A row is a stretch of a stored sequence `<bos> t1 .. tn <eos>`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


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
    return gather(flat, lengths.cumsum() - lengths, lengths, pad_id)


def gather(flat: NDArray[np.integer], starts: Ints, lengths: Ints, pad_id: int) -> Batch:
    """The batch of flat[start : start + length] for each row, without a loop over rows or tokens."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    steps = np.arange(lengths[0])[:, None]  # (L, 1)
    real = steps < lengths  # (L, B)
    tokens = np.full(real.shape, pad_id, np.int64)
    tokens[real] = flat[(starts + steps)[real]]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(order))


class Rows:
    """The rows of a corpus: its sequences, those of more than `max_length` tokens cut.

    Neighbouring rows of a cut sequence share one token, the last one read by the first and the first one read by the
    second. So every token is still predicted exactly once by each direction; only the context is shorter.

    Args:
        max_length: tokens in a row, `<bos>` and `<eos>` not counted.
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self.flat = sequences.tokens
        starts = sequences.offsets[:-1].astype(np.int64)
        lengths = np.diff(sequences.offsets.astype(np.int64))
        pieces = np.maximum(1, -(-(lengths - 1) // (max_length + 1)))  # a row of k tokens has k - 1 events
        self.split_sequences = int((pieces > 1).sum())
        piece = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
        skipped = piece * (max_length + 1)
        self.starts: Ints = np.repeat(starts, pieces) + skipped
        self.lengths: Ints = np.minimum(np.repeat(lengths, pieces) - skipped, max_length + 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Ints, pad_id: int) -> Batch:
        """The rows of the given indices as a batch."""
        return gather(self.flat, self.starts[indices], self.lengths[indices], pad_id)


def cut_batches(sorted_lengths: Ints, batch_size: int | None, max_tokens: int | None) -> list[tuple[int, int]]:
    """Cut rows that are sorted longest first into (start, end) of batches of at most `batch_size` rows or at most
    `max_tokens` padded tokens; a row that is longer than `max_tokens` by itself is a batch of its own."""
    cuts, start = [], 0
    while start < len(sorted_lengths):
        size = batch_size or max(1, (max_tokens or 1) // int(sorted_lengths[start]))
        cuts.append((start, min(start + size, len(sorted_lengths))))
        start += size
    return cuts


class BatchSource(Protocol):
    """What makes a batch out of what a sampler gives: `Rows` of row indices, a `Stream` of a span of steps."""

    def batch(self, part: Any, pad_id: int) -> Batch: ...


class Sampler(Protocol):
    """Which parts of a source each batch of an epoch holds, in order: a function of (seed, epoch) alone."""

    def epoch(self, epoch: int) -> Sequence[Any]: ...


class EpochSampler:
    """Which rows each batch of an epoch holds: a function of (seed, epoch) alone.

    Rows are shuffled, cut into buckets of `bucket_batches` batches, sorted by length within each bucket, cut into
    batches, and the batches shuffled. The state of a pass is (epoch, next batch); to resume takes no replay.
    """

    def __init__(
        self, lengths: Ints, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.lengths, self.batch_size, self.max_tokens, self.seed = lengths, batch_size, max_tokens, seed
        rows_a_batch = batch_size or max(1, (max_tokens or 1) // max(1, round(float(lengths.mean()))))
        self.bucket_rows = rows_a_batch * bucket_batches

    def epoch(self, epoch: int) -> list[Ints]:
        """The row indices of every batch of an epoch, in order; together each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        shuffled = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(shuffled), self.bucket_rows):
            bucket = shuffled[start : start + self.bucket_rows]
            bucket = bucket[np.argsort(-self.lengths[bucket], kind="stable")]
            for first, end in cut_batches(self.lengths[bucket], self.batch_size, self.max_tokens):
                batches.append(bucket[first:end])
        return [batches[place] for place in random.permutation(len(batches))]


class Group(NamedTuple):
    """The batches of one optimizer step, and where they stand in their epoch."""

    batches: list[Batch]
    epoch: int
    end: int  # number of batches of the epoch up to here, these counted
    epoch_batches: int  # batches in the epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether these are the epoch's last."""
        return self.end == self.epoch_batches


class Feed:
    """The groups of batches that training takes, epoch after epoch, each made while the step before it runs.

    Args:
        size: batches in a group; the last one of an epoch may have fewer.
        epoch, next_batch: where to begin.
    """

    def __init__(
        self, source: BatchSource, sampler: Sampler, pad_id: int, size: int, epoch: int = 0, next_batch: int = 0
    ) -> None:
        self.waited_s = 0.0  # altogether
        self._groups = self._walk(source, sampler, pad_id, size, epoch, next_batch)
        self._thread = ThreadPoolExecutor(1, "lmtrain-batches")
        self._coming = self._thread.submit(next, self._groups)

    @staticmethod
    def _walk(
        source: BatchSource, sampler: Sampler, pad_id: int, size: int, epoch: int, next_batch: int
    ) -> Iterator[Group]:
        while True:
            order = sampler.epoch(epoch)
            for first in range(next_batch, len(order), size):
                batches = [source.batch(part, pad_id) for part in order[first : first + size]]
                yield Group(batches, epoch, first + len(batches), len(order))
            epoch, next_batch = epoch + 1, 0

    def peek(self) -> Group:
        """The next group, which stays the next."""
        start_s = time.perf_counter()
        group = self._coming.result()
        self.waited_s += time.perf_counter() - start_s
        return group

    def take(self) -> Group:
        """The next group; the one after it is begun."""
        group = self.peek()
        self._coming = self._thread.submit(next, self._groups)
        return group

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def sorted_parts(lengths: Ints, max_tokens: int, batch_size: int | None = None) -> Iterator[Ints]:
    """The rows of each batch; each row once, longest first: the cheapest order where order does not matter."""
    order = np.argsort(-lengths, kind="stable")
    for start, end in cut_batches(lengths[order], batch_size, max_tokens):
        yield order[start:end]


def sorted_batches(rows: Rows, max_tokens: int, pad_id: int, batch_size: int | None = None) -> Iterator[Batch]:
    """Every row once, longest first, as in evaluation."""
    for part in sorted_parts(rows.lengths, max_tokens, batch_size):
        yield rows.batch(part, pad_id)
