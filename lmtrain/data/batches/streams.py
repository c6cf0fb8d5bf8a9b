"""Reads text in columns, through which the model carries its state: one long stream, or consecutive lines.

Each batch has a row of each column, and the next batch continues each column where its row ended. The `order` of a
batch says which column each row belongs to. For example, a stream of the tokens 0 .. 9 in two columns, 2 steps a batch:
column 0 predicts 0 1, then 2 3, then 4, while column 1 predicts 5 6, then 7 8, then 9.
Shapes: B columns, T tokens of the stream.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.order import Parts
from lmtrain.data.batches.rows import Batch, Rows, gather_batch
from lmtrain.data.store.paging import release_pages

RELEASE_TOKENS = 16 << 20  # number of tokens read after which their memory pages are released


class Span(NamedTuple):
    """The steps `first` up to `end` of some neighbouring columns."""

    first: int
    end: int
    columns: slice = slice(None)


def _columns(count: int, columns: int) -> tuple[Ints, Ints]:
    """Cut `count` tokens or rows into columns: where each begins and how many it has, both (B,).

    The first columns have one more than the others if `count` is no multiple of B.
    """
    steps, longer = divmod(count, columns)
    column = np.arange(columns)
    return column * steps + np.minimum(column, longer), steps + (column < longer)


class Stream:
    """One long text, cut into columns whose lengths differ by one token at most.

    Each token is predicted once: the first token of a column from the token before it in the text, and the first token
    of the text from `<eos>`.

    Args:
        flat: (T,) ids.
        columns: their number B, at most T.

    Attributes:
        steps: number of tokens in the shorter columns.
        starts, column_lengths: (B,) where each column begins, and how many tokens it has.
    """

    def __init__(self, flat: NDArray[np.integer], eos_id: int, columns: int) -> None:
        self.flat, self.eos_id = flat, eos_id
        self.steps = len(flat) // columns
        self.starts, self.column_lengths = _columns(len(flat), columns)
        self._read = 0  # tokens read since memory pages were last released

    def __len__(self) -> int:
        return len(self.column_lengths)

    def take(self, span: Span, columns: Ints) -> Span:
        """Return the same steps of some neighbouring columns, whose numbers are `columns` (B,)."""
        return span._replace(columns=slice(int(columns[0]), int(columns[-1]) + 1))

    def batch(self, span: Span, pad_id: int) -> Batch:
        """Return a row for each column: the token before the span, and then the tokens that are predicted."""
        starts = self.starts[span.columns] + span.first - 1
        batch = gather_batch(self.flat, starts, self.lengths(span), pad_id)
        if starts[0] < 0:
            batch.tokens[0, 0] = self.eos_id  # nothing stands before the text
        self._read += batch.tokens.numel()
        if self._read > RELEASE_TOKENS:
            release_pages(self.flat)
            self._read = 0
        return batch

    def lengths(self, span: Span) -> Ints:
        """Return the tokens of each column's row in a span, (B,), including the token before the span."""
        return np.minimum(self.column_lengths[span.columns], span.end) - span.first + 1

    def spans(self, cuts: Ints) -> Parts:
        """Return the spans between step 0, the steps `cuts`, (cuts,) ascending, and the end of the longest columns."""
        inner = cuts[(cuts > 0) & (cuts < self.steps)]
        borders = np.concatenate([[0], inner, self.column_lengths[:1]]).tolist()
        return Parts(len(borders) - 1, lambda number: Span(borders[number], borders[number + 1]))


class StreamSampler:
    """The order of a stream: from its beginning to its end in spans of `bptt` steps.

    Args:
        bptt: steps of a span, over which back-propagation is truncated.
        random_bptt: draw the length of each span (Merity et al. 2018, https://arxiv.org/abs/1708.02182): around `bptt`,
            or around half of it for one span in twenty, with a standard deviation of 5. So the borders, over which no
            gradient flows, are elsewhere in each epoch.
    """

    def __init__(self, stream: Stream, *, bptt: int, random_bptt: bool, seed: int) -> None:
        self.stream, self.bptt, self.random_bptt, self.seed = stream, bptt, random_bptt, seed

    def epoch(self, epoch: int) -> Parts:
        """Return the span of every batch, in the order of the text."""
        count = -(-self.stream.steps // self.bptt)
        if not self.random_bptt:
            return self.stream.spans(np.arange(1, count + 1) * self.bptt)
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        enough = 4 * count + 16  # spans are far longer than a quarter of `bptt` on average
        mean = np.where(random.random(enough) < 0.95, self.bptt, self.bptt / 2)
        lengths = np.clip(np.rint(random.normal(mean, 5)), max(1, self.bptt // 4), 2 * self.bptt).astype(np.int64)
        return self.stream.spans(lengths.cumsum())


class LinesSampler:
    """The order of consecutive lines: B columns of consecutive rows; batch t holds the t-th row of each column."""

    def __init__(self, rows: Rows, columns: int) -> None:
        self.starts, self.counts = _columns(len(rows), columns)

    def epoch(self, epoch: int) -> Parts:
        """Return the row indices of every batch, (B,) each, fewer if columns have ended; the same in each epoch."""
        return Parts(int(self.counts[0]), lambda step: self.starts[self.counts > step] + step)
