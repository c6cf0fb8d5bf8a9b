"""Decides in which order training reads the rows of a corpus: a function of (seed, epoch), so a resume replays nothing.

A sampler gives the parts of an epoch. A part is the rows of one batch, in the form that their source takes: indices for
`Rows`, `Stretches` for `WindowedRows`, a `Span` for a `Stream`. Shapes: B rows of a batch, R of a corpus or window.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import cut_batches, longest_first
from lmtrain.data.batches.windows import Stretches, WindowedRows
from lmtrain.system.processes import core_count

Row = TypeVar("Row", bound=np.generic)


class Sampler(Protocol):
    """Gives the parts of an epoch in order, as a function of (seed, epoch) alone."""

    def epoch(self, epoch: int) -> Sequence[Any]: ...


class Parts(Sequence[Any]):
    """The `length` parts of an epoch; `make(n)` makes part n when it is read."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        numbers = range(self.length)[index]  # a range also takes negative indices, and raises IndexError
        return [self.make(number) for number in numbers] if isinstance(numbers, range) else self.make(numbers)


class _BatchCutter:
    """Cuts buckets of rows into batches. `batch_size` or `max_tokens` is None; rows have a mean length of `mean`."""

    def __init__(self, batch_size: int | None, max_tokens: int | None, bucket_batches: int, mean: float) -> None:
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.bucket_rows = bucket_batches * (batch_size or max(1, (max_tokens or 1) // max(1, round(mean))))

    def batches(self, buckets: Iterable[Ints], lengths: Ints, random: np.random.Generator) -> list[Ints]:
        """Sort each bucket of row indices by `lengths` (R,), cut it into batches (B,), and shuffle all batches."""
        batches = []
        for bucket in buckets:
            bucket = bucket[longest_first(lengths[bucket])]
            cuts = cut_batches(lengths[bucket], self.batch_size, self.max_tokens)
            batches += [bucket[first:end] for first, end in cuts]
        return [batches[number] for number in random.permutation(len(batches))]

    def count(self, lengths: NDArray[np.integer]) -> int:
        """Count the batches of `max_tokens` in full buckets of rows with these lengths, (buckets, rows).

        It counts in all buckets at once, as there may be millions of batches.
        """
        longest = np.sort(lengths, axis=1, kind="stable")[:, ::-1]
        batches, bucket, start = 0, np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
        while len(bucket):
            batches += len(bucket)
            start += np.maximum(1, (self.max_tokens or 1) // longest[bucket, start].astype(np.int64))
            left = start < lengths.shape[1]
            bucket, start = bucket[left], start[left]
        return batches


class EpochSampler:
    """The order of the rows of a corpus that is shuffled as a whole.

    Rows are shuffled, cut into buckets of `bucket_batches` batches, sorted by length within each bucket and cut into
    batches; then the batches are shuffled. `lengths` are the tokens of each row, (R,).
    """

    def __init__(
        self, lengths: Ints, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.cut = _BatchCutter(batch_size, max_tokens, bucket_batches, float(lengths.mean()))

    def epoch(self, epoch: int) -> list[Ints]:
        """Return the row indices of every batch of an epoch, (B,) each; together they hold each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        shuffled, size = random.permutation(len(self.lengths)), self.cut.bucket_rows
        buckets = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        return self.cut.batches(buckets, self.lengths, random)


class WindowSampler:
    """The order of the rows of a corpus that is read window by window.

    The blocks of the corpus are shuffled, and each window takes as many as fill it. The rows of a window are spread
    over buckets, which become batches as in `EpochSampler`. The random numbers depend only on (seed, epoch, window), so
    any batch is found without those before it. A batch stays within its window.
    """

    def __init__(
        self, rows: WindowedRows, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.rows, self.seed = rows, seed
        self.cut = _BatchCutter(batch_size, max_tokens, bucket_batches, rows.mean_length)

    def epoch(self, epoch: int) -> Sequence[Stretches]:
        """Return the rows of every batch of an epoch; together they hold each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        windows = self.rows.windows(random.permutation(self.rows.blocks))
        ends = np.cumsum(self._counts(epoch, windows))

        held: dict[int, tuple[Stretches, list[Ints]]] = {}  # the one window that is in memory

        def load_part(batch: int) -> Stretches:
            window = int(np.searchsorted(ends, batch, side="right"))
            if window not in held:
                held.clear()  # before the next one takes memory
                held[window] = self._load_window(epoch, windows, window)
            stretches, batches = held[window]
            assert len(batches) == ends[window] - (ends[window - 1] if window else 0)
            return self.rows.take(stretches, batches[batch - int(ends[window])])

        return Parts(int(ends[-1]), load_part)

    def _load_window(self, epoch: int, windows: list[Ints], window: int) -> tuple[Stretches, list[Ints]]:
        """Return the rows of a window and its batches, and have the next window read ahead."""
        random = self.random(epoch, window)
        self.rows.release()
        for blocks in windows[window : window + 2]:
            self.rows.prefetch(blocks)
        stretches = self.rows.stretches(windows[window])
        tables = spread_rows(np.arange(len(stretches.lengths)), self.cut.bucket_rows, random)
        buckets = [bucket for table in tables for bucket in random.permuted(table, axis=1)]  # shuffles each bucket
        return stretches, self.cut.batches(buckets, stretches.lengths, random)

    def random(self, epoch: int, window: int) -> np.random.Generator:
        """Return the generator of a window. NumPy treats [seed, epoch, 0] as [seed, epoch], hence + 1."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch, window + 1]))

    def _counts(self, epoch: int, windows: list[Ints]) -> list[int]:
        """The number of batches of each window."""

        def count(window: int) -> int:
            if self.cut.batch_size is not None:
                return -(-self.rows.rows_of(windows[window]) // self.cut.batch_size)  # a full bucket has full batches
            lengths = self.rows.short_lengths(windows[window])
            return sum(map(self.cut.count, spread_rows(lengths, self.cut.bucket_rows, self.random(epoch, window))))

        with ThreadPoolExecutor(min(2, core_count())) as pool:  # sorting releases the lock; a window takes some 50 MB
            return list(pool.map(count, range(len(windows))))


def spread_rows(rows: NDArray[Row], size: int, random: np.random.Generator) -> list[NDArray[Row]]:
    """Spread rows over buckets of `size` rows, the last of which may have fewer.

    Of n consecutive rows, each of the n buckets gets one, in the order of the buckets but beginning with a random one.
    So each bucket has rows from everywhere, in a tenth of the time that it takes to shuffle a million rows.

    Args:
        rows: (R,) the index of each row, or its length.

    Returns:
        The full buckets, (buckets - 1, size), and the last bucket, (1, its rows).
    """
    buckets = -(-len(rows) // size)
    last = len(rows) - (buckets - 1) * size
    turns = last * buckets
    to_all = _turned(rows[:turns].reshape(last, buckets), random)
    to_full = _turned(rows[turns:].reshape(size - last, buckets - 1), random)
    return [np.concatenate([to_all[:, :-1], to_full]).T, to_all[:, -1:].T]


def _turned(table: NDArray[Row], random: np.random.Generator) -> NDArray[Row]:
    """Rotate each line of a table, (lines, width), by a random number of columns."""
    count, width = table.shape
    columns = np.arange(width) + random.integers(0, max(1, width), (count, 1))
    columns[columns >= width] -= width
    return np.take_along_axis(table, columns, axis=1)
