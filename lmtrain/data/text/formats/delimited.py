"""Tables of delimited cells: CSV and TSV. One column holds the texts.

Cells are cut by the rules of Python's csv module: a quote opens a quoted cell only where the cell begins, two quotes in
it stand for one, and line breaks in it are part of the cell.
"""

import csv
import json
import re
from bisect import bisect_left
from io import StringIO
from typing import Any, ClassVar

from lmtrain.data.text.formats.base import Format, Keys
from lmtrain.data.text.formats.columns import cut_column, rows_end
from lmtrain.data.text.formats.fields import choose_field, list_names
from lmtrain.data.text.reading import BEGINNING_BYTES, LONGEST_RECORD_BYTES, Block, RawBlock, decode, first_chunk
from lmtrain.errors import DataError

SAMPLED_ROWS = 200  # from which the delimiter, the quotes and the columns with text are known
CUT_LINES = 50  # a quoted cell that begins so few lines before the end of a beginning may be closed behind it


class CsvFormat(Format):
    """Rows of cells below a header row.

    Where `data.field` is a number and no column has that name, it counts columns from 1, and there is no header row.
    """

    delimiters: ClassVar[str] = ",;\t|"

    def __init__(self, keys: Keys) -> None:
        super().__init__(keys)
        csv.field_size_limit(2 * LONGEST_RECORD_BYTES)  # the module's own limit is 128 KiB a cell
        self._delimiter, self._has_quotes = "", False  # `header` finds out

    def header(self, path: str) -> str:
        """Return as JSON how the table is cut, and which of its columns holds the texts."""
        text = first_chunk(path, self.keys.encoding).decode("utf-8", "replace")
        by_name = re.match('"?sep=([^"])"?\n', text)  # the first line by which Excel names the delimiter
        first_row = by_name.end() if by_name else 0
        delimiters = by_name[1] if by_name else self.delimiters
        samples = {each: _sample(text[first_row:], each, self.has_quotes(text, each)) for each in delimiters}
        delimiter = max(samples, key=lambda each: _fit(samples[each]))
        rows, quotes = samples[delimiter], self.has_quotes(text, delimiter)
        if not rows:
            raise DataError(f"{path}: an empty table; it should have a header row and rows below it")
        line = 1 + text.count("\n", 0, first_row)
        column, names = self._column(f"{path}:{line}", rows)
        begin = line + _lines_of_first_row(text[first_row:], delimiter, quotes) if names else line
        self._delimiter, self._has_quotes = delimiter, quotes
        table = {"delimiter": delimiter, "quotes": quotes, "column": column, "names": names}
        return json.dumps({**table, "width": len(rows[0]), "begin": begin})

    def has_quotes(self, text: str, delimiter: str) -> bool:
        """Tell from the beginning of a table whether quotes enclose cells."""
        return True

    def _column(self, place: str, rows: list[list[str]]) -> tuple[int, list[str]]:
        """Return the index of the column with the texts, and the names of all columns; none if there is no header."""
        names, wanted = rows[0], self.keys.field
        if wanted not in names and wanted.isascii() and wanted.isdigit():
            if 1 <= int(wanted) <= len(names):
                return int(wanted) - 1, []
            raise DataError(f"{place}: no column {wanted} (data.field); the first row has {len(names)} cells")
        with_text = [name for at, name in enumerate(names) if name and any(_is_text(row[at:]) for row in rows[1:])]
        try:
            return names.index(choose_field(wanted, names, with_text)), names
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def details(self, header: str) -> str:
        table = json.loads(header)
        names, column = table["names"], table["column"]
        named = f"{names[column]!r} of {list_names(names)}" if names else f"{column + 1} of {table['width']}, no header"
        return f"cells between {table['delimiter']!r}{', also in quotes' if table['quotes'] else ''}; column {named}"

    def record_end(self, data: bytes) -> int:
        return rows_end(data, self._delimiter) if self._has_quotes else super().record_end(data)

    def too_long(self, path: str, line: int) -> DataError:
        most = f"{LONGEST_RECORD_BYTES >> 20} MiB"
        return DataError(f"{path}:{line}: the row that begins here has more than {most}; is a quote not closed?")

    def parse(self, raw: RawBlock) -> Block:
        table: dict[str, Any] = json.loads(raw.header)
        ways = table["delimiter"], table["column"], table["width"], table["quotes"]
        if (cells := cut_column(raw, *ways)) is None:
            return self._parse_rows(raw, table)
        above = bisect_left(cells.lines, table["begin"])
        return Block(raw.path, cells.lines[above:], cells.texts[above:])

    def _parse_rows(self, raw: RawBlock, table: dict[str, Any]) -> Block:
        """Return the texts of rows of any kind, such as those with line breaks; raises DataError at a faulty one."""
        reader = _reader(decode(raw), table["delimiter"], table["quotes"])
        lines: list[int] = []
        texts: list[str] = []
        line = raw.first_line
        try:
            for row in reader:
                if line >= table["begin"]:
                    if len(row) not in (table["width"], 0):
                        cells = f"{len(row)} cell{'s' * (len(row) > 1)}"
                        raise DataError(f"{raw.path}:{line}: a row of {cells}, and the first row has {table['width']}")
                    lines.append(line)
                    texts.append(row[table["column"]].strip("\n") if row else "")
                line = raw.first_line + reader.line_num
        except csv.Error as error:
            raise DataError(f"{raw.path}:{raw.first_line + reader.line_num - 1}: {error}") from None
        return Block(raw.path, lines, texts)


class TsvFormat(CsvFormat):
    """Rows of cells between tabs. Quotes enclose cells only if that fits all of the table's beginning; many such files
    hold quotes that are part of the text."""

    delimiters = "\t"

    def has_quotes(self, text: str, delimiter: str) -> bool:
        if '\t"' not in text and '\n"' not in text:
            return False
        try:
            rows = _sample(text, delimiter, quotes=True, strict=True)
        except csv.Error:
            return False
        return all(len(row) == len(rows[0]) for row in rows)


def _reader(text: str, delimiter: str, quotes: bool, strict: bool = False) -> Any:
    lines = StringIO(text, newline="\n")
    if quotes:
        return csv.reader(lines, delimiter=delimiter, strict=strict)
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _sample(text: str, delimiter: str, quotes: bool, strict: bool = False) -> list[list[str]]:
    """Return the first rows that are not blank; the last row of a text may be cut short and is left out."""
    rows: list[list[str]] = []
    reader, begun = _reader(text, delimiter, quotes, strict), 0
    while len(rows) <= SAMPLED_ROWS:
        try:
            row = next(reader, None)
        except csv.Error:
            is_cut_short = len(text) >= BEGINNING_BYTES // 4 and text.count("\n") - begun < CUT_LINES
            if strict and not is_cut_short:
                raise
            break
        if row is None:
            break
        if row:
            rows.append(row)
        begun = reader.line_num
    return rows[:-1] if len(rows) > 2 else rows


def _fit(rows: list[list[str]]) -> tuple[float, int]:
    """Return how well a delimiter cuts a table: the share of rows as wide as the first one, and that width."""
    width = len(rows[0]) if rows else 0
    return (sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0), width


def _lines_of_first_row(text: str, delimiter: str, quotes: bool) -> int:
    """Return how many lines the header row and the blank lines above it take."""
    reader = _reader(text, delimiter, quotes)
    next(filter(None, reader), None)
    return int(reader.line_num)


def _is_text(cells: list[str]) -> bool:
    """Whether the first of these cells holds a text, and not a number or nothing."""
    cell = "".join(cells[:1]).strip().replace(",", ".")
    try:
        float(cell)
    except ValueError:
        return bool(cell)
    return False
