"""JSON lines: every line is a JSON object, and one of its fields holds a text."""

import json
from typing import Any

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.fields import choose_field, list_names
from lmtrain.data.text.formats.text import LinesFormat
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block, RawBlock, first_chunk
from lmtrain.errors import DataError


class JsonlFormat(Format):
    """Every line is a JSON string, or an object one of whose fields is a text; a blank line is an empty text."""

    lines_are_records = True

    def header(self, path: str) -> str:
        """Return the name of the field that holds the text, as the first record has it."""
        first = next(filter(bytes.strip, first_chunk(path, self.keys.encoding).split(b"\n")), b"")
        try:
            record = json.loads(first)
        except (ValueError, RecursionError):
            return self.keys.field  # `parse` names the fault
        return field_of(record, self.keys.field, f"{path}:1") if isinstance(record, dict) else self.keys.field

    def details(self, header: str) -> str:
        return f"field {header!r} of each record"

    def parse(self, raw: RawBlock) -> Block:
        block = LinesFormat(self.keys).parse(raw)
        texts = []
        for number, line in zip(block.lines, block.texts, strict=True):
            try:
                texts.append(self._text(line, raw.header) if line.strip() else "")
            except DataError as error:
                raise DataError(f"{block.path}:{number}{error}") from None
        return block._replace(texts=texts, ended=True)

    def _text(self, line: str, field: str) -> str:
        """Return the text of a record; raises DataError with what follows the number of the line."""
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            way = "; is it an array? data.format: json reads one" if line.lstrip().startswith("[") else ""
            raise DataError(f":{error.colno}: not JSON: {error.msg}{way}") from None
        except (RecursionError, ValueError):
            raise DataError(": not JSON that can be read: nested too deep, or a number too long") from None
        return text_of({field: record} if isinstance(record, str) else record, field)


def field_of(record: dict[str, Any], wanted: str, place: str) -> str:
    """Return the name of the field of a record that holds its text; raises DataError with the place."""
    try:
        return choose_field(wanted, list(record), [name for name, value in record.items() if isinstance(value, str)])
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def text_of(record: Any, field: str) -> str:
    """Return the text of a record, without the line breaks at its ends; null is an empty text.

    Raises:
        DataError: the record is no object with such a text; the message begins with a colon, for a place before it.
    """
    if isinstance(record, list):
        raise DataError(f": not an object whose field {field!r} is text; an array of records is data.format: json")
    if not isinstance(record, dict):
        raise DataError(f": not an object whose field {field!r} is text")
    if field not in record:
        raise DataError(f": no field {field!r} (set data.field); it has {list_names(list(record))}")
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        raise DataError(f": not an object whose field {field!r} is text")
    if "\0" in text:
        raise DataError(f": a NUL character in field {field!r}")
    return normalise(text.encode("utf-8", "replace").decode()).strip("\n")  # \u escapes may hold half a surrogate pair
