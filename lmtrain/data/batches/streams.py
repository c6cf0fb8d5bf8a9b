"""Text that goes on from row to row: one long stream in columns, or lines that follow on.

Shapes: B columns, L longest row. A model that reads such batches carries its state from each row of a column to the
column's next row; which column a row belongs to is what the batch's `order` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.order import Parts
from lmtrain.data.batches.rows import Batch, Rows, gather_batch
from lmtrain.data.store.paging import release_pages


class Span(NamedTuple):
    """Some steps of some columns that stand side by side."""

    first: int
    end: int
    columns: slice = slice(None)


RELEASED = 16 << 20  # tokens, after which what was read of a text is let go


def _columns(count: int, columns: int) -> tuple[Ints, Ints]:
    """Where each column of so many things begins, and how many it has: the first ones have one more where need be."""
    steps, longer = divmod(count, columns)
    column = np.arange(columns)
    return column * steps + np.minimum(column, longer), steps + (column < longer)


class Stream:
    """One long text of T tokens in `columns` columns, which differ by one token at most.

    Each token is predicted once: a column's first one from the token that stands before it in the text, and the
    text's very first from `<eos>`.

    Args:
        flat: (T,) ids, T >= columns.
    """

    def __init__(self, flat: NDArray[np.integer], eos_id: int, columns: int) -> None:
        self.flat, self.eos_id = flat, eos_id
        self.steps = len(flat) // columns  # of the shorter columns
        self.starts, self.column_lengths = _columns(len(flat), columns)
        self._read = 0  # tokens, since some were let go

    def __len__(self) -> int:
        return len(self.column_lengths)

    def take(self, span: Span, places: Ints) -> Span:
        """Of the columns of a span those at the given places, which follow on."""
        return span._replace(columns=slice(int(places[0]), int(places[-1]) + 1))

    def batch(self, span: Span, pad_id: int) -> Batch:
        """Some steps of columns: the token before them, and then those that are predicted."""
        starts = self.starts[span.columns] + span.first - 1
        batch = gather_batch(self.flat, starts, self.lengths(span), pad_id)
        if starts[0] < 0:
            batch.tokens[0, 0] = self.eos_id  # nothing stands before the text
        self._read += batch.tokens.numel()
        if self._read > RELEASED:
            release_pages(self.flat)
            self._read = 0
        return batch

    def lengths(self, span: Span) -> Ints:
        """Tokens of each column's row in a span, the one before them counted."""
        return np.minimum(self.column_lengths[span.columns], span.end) - span.first + 1

    def spans(self, cuts: Ints) -> Parts[Span]:
        """The spans between steps 0, `cuts` and the end; the longer columns have one more token in the last."""
        inner = cuts[(cuts > 0) & (cuts < self.steps)]
        borders = np.concatenate([[0], inner, self.column_lengths[:1]]).tolist()
        return Parts(len(borders) - 1, lambda number: Span(borders[number], borders[number + 1]))


class StreamSampler:
    """An epoch of a stream, from its beginning to its end in spans of `bptt` steps.

    Args:
        random_bptt: draw each span's length, as Merity et al. 2018, https://arxiv.org/abs/1708.02182: around `bptt`,
            now and then around half of it, with a standard deviation of 5. So the borders, over which no gradient
            flows, lie elsewhere in each epoch.
    """

    def __init__(self, stream: Stream, *, bptt: int, random_bptt: bool, seed: int) -> None:
        self.stream, self.bptt, self.random_bptt, self.seed = stream, bptt, random_bptt, seed

    def epoch(self, epoch: int) -> Parts[Span]:
        """The span of every batch, in the order of the text."""
        count = -(-self.stream.steps // self.bptt)
        if not self.random_bptt:
            return self.stream.spans(np.arange(1, count + 1) * self.bptt)
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        longest = 4 * count + 16  # spans are at least half as long as they would be on average
        mean = np.where(random.random(longest) < 0.95, self.bptt, self.bptt / 2)
        lengths = np.clip(np.rint(random.normal(mean, 5)), max(1, self.bptt // 4), 2 * self.bptt).astype(np.int64)
        return self.stream.spans(lengths.cumsum())


class LinesSampler:
    """An epoch of lines that follow on: B columns of consecutive rows, batch t holding the t-th row of each column."""

    def __init__(self, rows: Rows, columns: int) -> None:
        self.starts, self.counts = _columns(len(rows), columns)

    def epoch(self, epoch: int) -> Parts[Ints]:
        """The row indices of every batch, column by column; the same in each epoch."""
        return Parts(int(self.counts[0]), lambda step: self.starts[self.counts > step] + step)
