"""In which order training reads the rows of a corpus: a function of (seed, epoch), so that a resume takes no replay.

Shapes: R rows of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import cut_batches, longest_first
from lmtrain.data.batches.windows import Stretches, WindowedRows
from lmtrain.system.processes import core_count

Part = TypeVar("Part", covariant=True)
Row = TypeVar("Row", bound=np.generic)


class Sampler(Protocol):
    """Which parts of a source each batch of an epoch holds, in order: a function of (seed, epoch) alone."""

    def epoch(self, epoch: int) -> Sequence[Any]: ...


class Parts(Sequence[Part], Generic[Part]):
    """The parts of an epoch, each made when it is asked for.

    Args:
        make: from a part's number to the part.
    """

    def __init__(self, length: int, make: Callable[[int], Part]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> Part: ...
    @overload
    def __getitem__(self, place: slice) -> list[Part]: ...
    def __getitem__(self, place: int | slice) -> Part | list[Part]:
        numbers = range(self.length)[place]  # also knows what -1 is, and what is too far
        return [self.make(number) for number in numbers] if isinstance(numbers, range) else self.make(numbers)


class _Cut(NamedTuple):
    """How buckets of rows become batches."""

    batch_size: int | None
    max_tokens: int | None
    bucket_rows: int

    @classmethod
    def of(cls, batch_size: int | None, max_tokens: int | None, bucket_batches: int, mean_length: float) -> _Cut:
        rows_a_batch = batch_size or max(1, (max_tokens or 1) // max(1, round(mean_length)))
        return cls(batch_size, max_tokens, rows_a_batch * bucket_batches)

    def batches(self, buckets: Iterable[Ints], lengths: Ints, random: np.random.Generator) -> list[Ints]:
        """Sort each bucket by length, cut it into batches, and shuffle all the batches.

        Args:
            buckets: the indices of the rows of each.
            lengths: (R,) of all rows.
        """
        batches = []
        for bucket in buckets:
            of_bucket = lengths[bucket]
            order = longest_first(of_bucket)
            bucket, of_bucket = bucket[order], of_bucket[order]
            batches += [bucket[first:end] for first, end in cut_batches(of_bucket, self.batch_size, self.max_tokens)]
        return [batches[place] for place in random.permutation(len(batches))]

    def count(self, lengths: NDArray[np.integer]) -> int:
        """How many batches of `max_tokens` there are in buckets with rows of these lengths, (buckets, rows): in all
        buckets at once, as there may be millions of batches."""
        longest = np.sort(lengths, axis=1, kind="stable")[:, ::-1]
        batches, bucket, start = 0, np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
        while len(bucket):
            batches += len(bucket)
            start += np.maximum(1, (self.max_tokens or 1) // longest[bucket, start].astype(np.int64))
            left = start < lengths.shape[1]
            bucket, start = bucket[left], start[left]
        return batches


class EpochSampler:
    """Which rows each batch of an epoch holds: a function of (seed, epoch) alone.

    Rows are shuffled, cut into buckets of `bucket_batches` batches, sorted by length within each bucket, cut into
    batches, and the batches shuffled. The state of a pass is (epoch, next batch); to resume takes no replay.
    """

    def __init__(
        self, lengths: Ints, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.cut = _Cut.of(batch_size, max_tokens, bucket_batches, float(lengths.mean()))

    def epoch(self, epoch: int) -> list[Ints]:
        """The row indices of every batch of an epoch, in order; together each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        shuffled, size = random.permutation(len(self.lengths)), self.cut.bucket_rows
        buckets = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        return self.cut.batches(buckets, self.lengths, random)


class WindowSampler:
    """An epoch of a corpus that is read window by window.

    The blocks of the corpus are shuffled, and as many are taken at a time as fill a window. Its rows are dealt out to
    buckets, which go on as those of `EpochSampler`. All this is by a generator of (seed, epoch, window), so that any
    batch is found without those before it. A batch stays within its window.
    """

    def __init__(
        self, rows: WindowedRows, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.rows, self.seed = rows, seed
        self.cut = _Cut.of(batch_size, max_tokens, bucket_batches, rows.mean_length)

    def epoch(self, epoch: int) -> Sequence[Stretches]:
        """The rows of every batch of an epoch, in order; together each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        windows = self.rows.windows(random.permutation(self.rows.blocks))
        ends = np.cumsum(self._counts(epoch, windows))
        return Parts(int(ends[-1]), _Pass(self, epoch, windows, ends).part)

    def random(self, epoch: int, window: int) -> np.random.Generator:
        """The generator of a window. NumPy reads [seed, epoch, 0] as [seed, epoch], which is the blocks'."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch, window + 1]))

    def _counts(self, epoch: int, windows: list[Ints]) -> list[int]:
        """How many batches each window has."""

        def count(window: int) -> int:
            if self.cut.batch_size is not None:
                return -(-self.rows.rows_of(windows[window]) // self.cut.batch_size)  # a full bucket has full batches
            lengths = self.rows.short_lengths(windows[window])
            return sum(map(self.cut.count, spread_rows(lengths, self.cut.bucket_rows, self.random(epoch, window))))

        with ThreadPoolExecutor(min(2, core_count())) as pool:  # sorting holds no lock; each takes some 50 MB
            return list(pool.map(count, range(len(windows))))


def spread_rows(rows: NDArray[Row], size: int, random: np.random.Generator) -> list[NDArray[Row]]:
    """Deal rows out to buckets of `size` rows, the last of which may have fewer: of so many neighbours as there are
    buckets each one gets one, by a random turn.

    So a bucket has rows from everywhere, and a million are dealt in a tenth of the time it takes to shuffle them.

    Returns:
        The full buckets, (buckets - 1, size), and the last one, (1, rows).
    """
    buckets = -(-len(rows) // size)
    last = len(rows) - (buckets - 1) * size
    turns = last * buckets
    to_all = _turned(rows[:turns].reshape(last, buckets), random)
    to_full = _turned(rows[turns:].reshape(size - last, buckets - 1), random)
    return [np.concatenate([to_all[:, :-1], to_full]).T, to_all[:, -1:].T]


def _turned(table: NDArray[Row], random: np.random.Generator) -> NDArray[Row]:
    """Each line of a table moved on by a random number of places; what falls off its end goes to its beginning."""
    count, width = table.shape
    places = np.arange(width) + random.integers(0, max(1, width), (count, 1))
    places[places >= width] -= width
    return np.take_along_axis(table, places, axis=1)


class _Pass:
    """One way through the windows of an epoch; the window it is in is the one that is held."""

    def __init__(self, sampler: WindowSampler, epoch: int, windows: list[Ints], ends: Ints) -> None:
        self.sampler, self.epoch, self.windows, self.ends = sampler, epoch, windows, ends
        self.window = -1  # the one that is held

    def part(self, batch: int) -> Stretches:
        """The rows of a batch, by its number in the epoch."""
        window = int(np.searchsorted(self.ends, batch, side="right"))
        if window != self.window:
            self._enter(window)
        end = int(self.ends[window])
        return self.sampler.rows.take(self.stretches, self.batches[batch - end])

    def _enter(self, window: int) -> None:
        rows, cut, random = self.sampler.rows, self.sampler.cut, self.sampler.random(self.epoch, window)
        rows.release()
        for coming in self.windows[window : window + 2]:
            rows.announce(coming)
        self.stretches = rows.stretches(self.windows[window])
        lengths = self.stretches.lengths
        dealt = spread_rows(np.arange(len(lengths)), cut.bucket_rows, random)
        buckets = [bucket for table in dealt for bucket in random.permuted(table, axis=1)]  # neighbours in it, too
        self.batches = cut.batches(buckets, lengths, random)
        assert len(self.batches) == self.ends[window] - (self.ends[window - 1] if window else 0)
        self.window = window
