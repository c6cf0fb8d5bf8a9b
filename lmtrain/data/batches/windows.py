"""The rows of a corpus that is larger than memory: cut into blocks, of which a window holds some hundred at a time.

Shapes: K blocks, R rows. A block is a stretch of consecutive sequences, some 256 KiB of ids: read from a disk at once,
in about the time of a single row. Of the corpus as a whole only the blocks' borders are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import Batch, Sequences, count_rows, cut_rows, gather_batch, narrow, sorted_parts
from lmtrain.data.store.paging import prefetch_pages, release_pages

WINDOW_ROWS = 1 << 20  # a window has about as many rows, or
WINDOW_BYTES = 64 << 20  # of ids; whichever are fewer
WINDOW_BLOCKS = 256  # so many places of the corpus are mixed in a window
SCANNED = 1 << 17  # sequences at once, few enough for a processor's own memory


class Stretches(NamedTuple):
    """Rows by where they stand among the corpus's ids."""

    starts: Ints  # (R,)
    lengths: Ints  # (R,)


def fits_a_window(sequences: Sequences) -> bool:
    """Whether a corpus is one that can be shuffled as a whole."""
    return len(sequences.offsets) - 1 <= WINDOW_ROWS and sequences.tokens.nbytes <= WINDOW_BYTES


class WindowedRows:
    """The rows of a corpus as `cut_rows` has them, but found block by block.

    Args:
        window_rows, window_bytes: about how many rows and bytes of ids a window has at most.

    Attributes:
        blocks: their number K.
        mean_length: tokens of a row.
    """

    def __init__(
        self,
        sequences: Sequences,
        max_length: int,
        window_rows: int = WINDOW_ROWS,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.flat, self.max_length = sequences.tokens, max_length
        self.offsets = np.asarray(sequences.offsets)  # without what a memmap does at each slice
        count = len(self.offsets) - 1
        tokens = int(self.offsets[-1])
        row_tokens = min(tokens / count, max_length + 2)  # on average, about
        block_tokens = max(1, int(min(window_bytes / self.flat.itemsize, window_rows * row_tokens) / WINDOW_BLOCKS))
        self._firsts, self._starts, self._rows_before, self.split_sequences = self._scan(block_tokens)
        self.blocks = len(self._firsts) - 1
        self.mean_length = (tokens + len(self) - count) / len(self)  # each cut of a sequence repeats a token

    def _scan(self, block_tokens: int) -> tuple[Ints, Ints, Ints, int]:
        """At which sequence and token each block begins and how many rows stand before it, all (K + 1,); also how many
        sequences are split. A block begins with the first sequence behind each multiple of `block_tokens`."""
        count, rows, split = len(self.offsets) - 1, 0, 0
        firsts, starts, rows_before = [0], [0], [0]
        for first in range(0, count, SCANNED):
            offsets = self.offsets[first : first + SCANNED + 1].astype(np.int64)
            of_each = count_rows(np.diff(offsets), self.max_length)
            borders = np.arange(offsets[0] // block_tokens + 1, offsets[-1] // block_tokens + 1) * block_tokens
            last = np.unique(np.searchsorted(offsets[1:], borders))  # sequences of blocks: what reaches a border
            before = rows + of_each.cumsum()
            firsts += (first + last + 1).tolist()
            starts += offsets[last + 1].tolist()
            rows_before += before[last].tolist()
            rows, split = int(before[-1]), split + int((of_each > 1).sum())
            release_pages(self.offsets)
        if firsts[-1] < count:  # the last block is not full
            firsts.append(count)
            starts.append(int(self.offsets[-1]))
            rows_before.append(rows)
        return np.array(firsts), np.array(starts), np.array(rows_before), split

    def __len__(self) -> int:
        return int(self._rows_before[-1])

    # ---- as a source of batches

    def batch(self, part: Stretches, pad_id: int) -> Batch:
        """These rows as a batch."""
        return gather_batch(self.flat, part.starts, part.lengths, pad_id)

    def lengths(self, part: Stretches) -> Ints:
        """Tokens of each of these rows."""
        return part.lengths

    def take(self, part: Stretches, places: Ints) -> Stretches:
        """Of these rows the ones at some places."""
        return Stretches(part.starts[places], part.lengths[places])

    # ---- block by block

    def windows(self, blocks: Ints) -> list[Ints]:
        """Blocks in some order, as many together as make a window."""
        return np.array_split(blocks, -(-len(blocks) // WINDOW_BLOCKS))

    def rows_of(self, blocks: Ints) -> int:
        """How many rows these blocks have."""
        return int((self._rows_before[blocks + 1] - self._rows_before[blocks]).sum())

    def stretches(self, blocks: Ints) -> Stretches:
        """The rows of these blocks, block after block."""
        starts, lengths = zip(*self._cut(blocks), strict=True)
        return Stretches(np.concatenate(starts), np.concatenate(lengths))

    def short_lengths(self, blocks: Ints) -> NDArray[np.integer]:
        """Tokens of these rows, in 16 bits where they fit."""
        return np.concatenate([narrow(lengths) for _, lengths in self._cut(blocks)])

    def announce(self, blocks: Ints) -> None:
        """These blocks will be read soon."""
        prefetch_pages(self.flat, zip(self._starts[blocks].tolist(), self._starts[blocks + 1].tolist(), strict=True))

    def release(self) -> None:
        """What was read is done with."""
        release_pages(self.flat)

    def _cut(self, blocks: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Starts and lengths of the rows of each block."""
        for number, (first, end) in enumerate(zip(self._firsts[blocks], self._firsts[blocks + 1], strict=True)):
            yield cut_rows(self.offsets[first : end + 1], self.max_length)
            if number % 16 == 15:  # the system maps far more around each
                release_pages(self.offsets)
        release_pages(self.offsets)

    def sorted_parts(self, max_tokens: int, batch_size: int | None = None) -> Iterator[Stretches]:
        """Every row once, window after window from the beginning of the corpus, longest first in each."""
        for blocks in self.windows(np.arange(self.blocks)):
            self.announce(blocks)
            stretches = self.stretches(blocks)
            for part in sorted_parts(stretches.lengths, max_tokens, batch_size):
                yield self.take(stretches, part)
            self.release()
