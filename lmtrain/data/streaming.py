"""Text that goes on from row to row: one long stream in columns, or lines that follow on.

Shapes: B columns, L longest row. A model that reads such batches carries its state from each row of a column to the
column's next row; which column a row belongs to is what the batch's `order` says.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.batching import Batch, Ints, Rows, gather


class Span(NamedTuple):
    """Some steps of some columns that stand side by side."""

    first: int
    end: int
    columns: slice = slice(None)


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
        self.starts, self.lengths = _columns(len(flat), columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, span: Span) -> Ints:
        """Tokens of each column in a span: the one before its steps, and those that are predicted."""
        return np.minimum(self.lengths[span.columns], span.end) - span.first + 1

    def take(self, span: Span, places: Ints) -> Span:
        """Of the columns of a span those at the given places, which follow on."""
        return span._replace(columns=slice(int(places[0]), int(places[-1]) + 1))

    def batch(self, span: Span, pad_id: int) -> Batch:
        """Some steps of columns: the token before them, and then those that are predicted."""
        starts = self.starts[span.columns] + span.first - 1
        batch = gather(self.flat, starts, self.lengths_of(span), pad_id)
        if starts[0] < 0:
            batch.tokens[0, 0] = self.eos_id  # nothing stands before the text
        return batch

    def spans(self, cuts: Ints) -> list[Span]:
        """The spans between steps 0, `cuts` and the end; the longer columns have one more token in the last."""
        inner = [int(cut) for cut in cuts if 0 < cut < self.steps]
        return list(map(Span, [0, *inner], [*inner, int(self.lengths[0])]))


class StreamSampler:
    """An epoch of a stream, from its beginning to its end in spans of `bptt` steps.

    Args:
        random_bptt: draw each span's length, as Merity et al. 2018, https://arxiv.org/abs/1708.02182: around `bptt`,
            now and then around half of it, with a standard deviation of 5. So the borders, over which no gradient
            flows, lie elsewhere in each epoch.
    """

    def __init__(self, stream: Stream, *, bptt: int, random_bptt: bool, seed: int) -> None:
        self.stream, self.bptt, self.random_bptt, self.seed = stream, bptt, random_bptt, seed

    def epoch(self, epoch: int) -> list[Span]:
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

    def epoch(self, epoch: int) -> list[Ints]:
        """The row indices of every batch, column by column; the same in each epoch."""
        return [self.starts[self.counts > step] + step for step in range(int(self.counts[0]))]
