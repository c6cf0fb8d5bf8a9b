"""Cuts one column out of a delimited table, all rows at once, in less than half of the csv module's time.

It takes only tables of which it is certain that the csv module would cut them in the same way: all rows are equally
wide, and each quote opens a cell, closes one, or is one of two within a quoted cell.

Shapes: B bytes, a line end before and behind the table included; Q quotes; C cells; R rows.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import RawBlock

_NEWLINE, _QUOTE = ord("\n"), ord('"')
# a quoted cell behind %b, closed or not; possessive, since two quotes never end a cell
_QUOTED = rb'"(?:(?<=%b")|(?<=\n")|(?<=\A"))[^"]*+(?:""[^"]*+)*+(?:"|\Z)'


class Column(NamedTuple):
    """The cells of one column."""

    lines: Sequence[int]  # in which each row begins
    texts: list[str]


def cut_column(raw: RawBlock, delimiter: str, column: int, width: int, quotes: bool) -> Column | None:
    """Return a column of a block of whole rows; None where it is not certain how to cut it, or it is broken.

    Args:
        column: its index.
        width: cells of a row.
        quotes: whether quotes enclose cells.
    """
    if not delimiter.isascii():
        return None
    framed = b"\n%b\n" % raw.data.removesuffix(b"\n")
    flat = np.frombuffer(framed, np.uint8)
    ends = np.flatnonzero((flat == ord(delimiter)) | (flat == _NEWLINE))  # (C + 1,): before and behind each cell
    newlines = ends[flat[ends] == _NEWLINE]
    found = _regular_quotes(flat, delimiter) if quotes and b'"' in raw.data else np.zeros(0, np.int64)
    if found is None or len(found) % 2:
        return None
    if len(found):
        ends = ends[np.searchsorted(found, ends) % 2 == 0]
    row_ends = ends[flat[ends] == _NEWLINE]  # (R + 1,)
    if len(ends) != (len(row_ends) - 1) * width + 1 or not np.array_equal(ends[::width], row_ends):
        return None
    starts, stops = ends[column:-1:width] + 1, ends[column + 1 :: width]
    if len(found):
        is_quoted = flat[starts] == _QUOTE
        starts, stops = starts + is_quoted, stops - is_quoted
    cells = [framed[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    doubled = found[1:-1:2][found[1:-1:2] + 1 == found[2::2]]  # the first of two quotes within a cell
    for row in np.unique(np.searchsorted(starts, doubled, "right").clip(1) - 1).tolist():
        cells[row] = cells[row].replace(b'""', b'"')
    try:
        texts = normalise(b"\0".join(cells).decode()).split("\0")
    except UnicodeDecodeError:
        return None
    if len(texts) != len(cells):  # a NUL character
        return None
    if len(newlines) == len(row_ends):
        return Column(range(raw.first_line, raw.first_line + len(texts)), texts)
    lines = raw.first_line + np.searchsorted(newlines, row_ends[:-1])
    return Column(lines.tolist(), [text.strip("\n") for text in texts])


def rows_end(data: bytes, delimiter: str) -> int:
    """Return how many of these bytes, which begin with a row, belong to rows that end in them; quotes enclose cells."""
    cells = _quoted_cells(data, delimiter) if b'"' in data else []
    end = len(data)  # of what lies between two quoted cells
    for begin, cell_end in cells[::-1]:
        if (newline := data.rfind(b"\n", cell_end, end)) >= 0:
            return newline + 1
        end = begin
    return data.rfind(b"\n", 0, end) + 1


def _quoted_cells(data: bytes, delimiter: str) -> Ints | list[tuple[int, int]]:
    """Return where quoted cells begin and end, in order; a cell with two quotes for one is two or more cells here."""
    quotes = _regular_quotes(np.frombuffer(b"\n%b\n" % data, np.uint8), delimiter) if delimiter.isascii() else None
    if quotes is None:
        return [cell.span() for cell in re.finditer(_QUOTED % re.escape(delimiter.encode()), data)]
    begins, ends = quotes[::2] - 1, quotes[1::2]  # in bytes without the line end before them
    return np.stack([begins, np.append(ends, len(data))[: len(begins)]], 1)  # the last one may not be closed


def _regular_quotes(flat: NDArray[np.uint8], delimiter: str) -> Ints | None:
    """Return the places of all quotes (Q,), opening and closing ones in turns; None if one stands where none should.

    Args:
        flat: bytes (B,) between two line ends; they begin with a row.
    """
    quotes = np.flatnonzero(flat == _QUOTE)
    opening, closing = quotes[::2], quotes[1::2]
    before, behind = flat[opening - 1], flat[closing + 1]
    is_opening = (before == ord(delimiter)) | (before == _NEWLINE)
    is_closing = (behind == ord(delimiter)) | (behind == _NEWLINE)
    is_doubled = opening[1:] == closing[: len(opening) - 1] + 1
    is_opening[1:] |= is_doubled
    is_closing[: len(is_doubled)] |= is_doubled
    return quotes if is_opening.all() and is_closing.all() else None
