"""Reads the rows of a corpus that is larger than memory, a window at a time.

The corpus is cut into blocks of consecutive sequences, some 256 KiB of ids each, which a disk reads in about the time
of a single row. A window is some hundred blocks from all over the corpus. Only the borders of the
blocks are in memory for the whole corpus. Shapes: R rows of some blocks or of a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import Batch, Sequences, count_rows, cut_rows, gather_batch, narrow, sorted_parts
from lmtrain.data.store.paging import prefetch_pages, release_pages

WINDOW_ROWS = 1 << 20  # about the most rows of a window
WINDOW_BYTES = 64 << 20  # about the most bytes of ids of a window
WINDOW_BLOCKS = 256  # a window mixes blocks from as many places of the corpus
SCANNED = 1 << 17  # sequences that are scanned at once: few enough for a processor's cache


class Stretches(NamedTuple):
    """Rows, given by where they are in the ids of the corpus: row r is flat[starts[r] : starts[r] + lengths[r]]."""

    starts: Ints  # (R,)
    lengths: Ints  # (R,)


def fits_a_window(sequences: Sequences) -> bool:
    """Return whether a corpus is small enough to be shuffled as a whole."""
    return len(sequences.offsets) - 1 <= WINDOW_ROWS and sequences.tokens.nbytes <= WINDOW_BYTES


class WindowedRows:
    """The rows of a corpus, the same as those of `Rows`, but computed block by block.

    Args:
        window_rows, window_bytes: about the most rows and bytes of ids in a window.

    Attributes:
        blocks: number of blocks.
        mean_length: mean number of tokens of a row.
        split_sequences: how many sequences are longer than `max_length` and are cut.
    """

    def __init__(
        self, sequences: Sequences, max_length: int, window_rows: int = WINDOW_ROWS, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self.flat, self.max_length = sequences.tokens, max_length
        self.offsets = np.asarray(sequences.offsets)  # an array is sliced faster than a memmap
        count = len(self.offsets) - 1
        tokens = int(self.offsets[-1])
        row_tokens = min(tokens / count, max_length + 2)  # about the mean
        block_tokens = max(1, int(min(window_bytes / self.flat.itemsize, window_rows * row_tokens) / WINDOW_BLOCKS))
        self._firsts, self._starts, self._rows_before, self.split_sequences = self._scan(block_tokens)
        self.blocks = len(self._firsts) - 1
        self.mean_length = (tokens + len(self) - count) / len(self)  # each cut of a sequence repeats a token

    def _scan(self, block_tokens: int) -> tuple[Ints, Ints, Ints, int]:
        """Find the blocks: one begins with the first sequence behind each multiple of `block_tokens`.

        Returns:
            The first sequence and the first token of each block and the number of rows before it, each (blocks + 1,);
            and how many sequences are cut.
        """
        count, rows, split = len(self.offsets) - 1, 0, 0
        firsts, starts, rows_before = [0], [0], [0]
        for first in range(0, count, SCANNED):
            offsets = self.offsets[first : first + SCANNED + 1].astype(np.int64)
            row_counts = count_rows(np.diff(offsets), self.max_length)
            borders = np.arange(offsets[0] // block_tokens + 1, offsets[-1] // block_tokens + 1) * block_tokens
            last = np.unique(np.searchsorted(offsets[1:], borders))  # a block's last sequence reaches a border
            row_ends = rows + row_counts.cumsum()
            firsts += (first + last + 1).tolist()
            starts += offsets[last + 1].tolist()
            rows_before += row_ends[last].tolist()
            rows, split = int(row_ends[-1]), split + int((row_counts > 1).sum())
            release_pages(self.offsets)
        if firsts[-1] < count:  # the last block is not full
            firsts.append(count)
            starts.append(int(self.offsets[-1]))
            rows_before.append(rows)
        return np.array(firsts), np.array(starts), np.array(rows_before), split

    def __len__(self) -> int:
        return int(self._rows_before[-1])

    def batch(self, part: Stretches, pad_id: int) -> Batch:
        """Return these rows as a batch."""
        return gather_batch(self.flat, part.starts, part.lengths, pad_id)

    def lengths(self, part: Stretches) -> Ints:
        """Return the tokens of each of these rows, (R,)."""
        return part.lengths

    def take(self, part: Stretches, chosen: Ints) -> Stretches:
        """Return some of these rows, by their indices (chosen,) in `part`."""
        return Stretches(part.starts[chosen], part.lengths[chosen])

    def windows(self, blocks: Ints) -> list[Ints]:
        """Cut block numbers, (blocks,) in any order, into windows of at most `WINDOW_BLOCKS`."""
        return np.array_split(blocks, -(-len(blocks) // WINDOW_BLOCKS))

    def rows_of(self, blocks: Ints) -> int:
        """Return how many rows these blocks, (blocks,), have in all."""
        return int((self._rows_before[blocks + 1] - self._rows_before[blocks]).sum())

    def stretches(self, blocks: Ints) -> Stretches:
        """Return the rows of these blocks, block after block."""
        starts, lengths = zip(*self._cut(blocks), strict=True)
        return Stretches(np.concatenate(starts), np.concatenate(lengths))

    def short_lengths(self, blocks: Ints) -> NDArray[np.integer]:
        """Return the tokens of each row of these blocks, (R,), in 16 bits where they fit."""
        return np.concatenate([narrow(lengths) for _, lengths in self._cut(blocks)])

    def prefetch(self, blocks: Ints) -> None:
        """Ask the system to read these blocks ahead."""
        prefetch_pages(self.flat, zip(self._starts[blocks].tolist(), self._starts[blocks + 1].tolist(), strict=True))

    def release(self) -> None:
        """Release all memory pages that were read."""
        release_pages(self.flat)

    def _cut(self, blocks: Ints) -> Iterator[tuple[Ints, Ints]]:
        """The starts and the lengths of the rows of each block."""
        for number, (first, end) in enumerate(zip(self._firsts[blocks], self._firsts[blocks + 1], strict=True)):
            yield cut_rows(self.offsets[first : end + 1], self.max_length)
            if number % 16 == 15:  # the system maps far more than what is read
                release_pages(self.offsets)
        release_pages(self.offsets)

    def sorted_parts(self, max_tokens: int, batch_size: int | None = None) -> Iterator[Stretches]:
        """Yield the rows of each batch, window after window from the beginning of the corpus, longest first in each."""
        for blocks in self.windows(np.arange(self.blocks)):
            self.prefetch(blocks)
            stretches = self.stretches(blocks)
            for part in sorted_parts(stretches.lengths, max_tokens, batch_size):
                yield self.take(stretches, part)
            self.release()
