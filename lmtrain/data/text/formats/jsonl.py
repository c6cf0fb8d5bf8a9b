"""JSON lines: every line is a JSON object, and one of its fields holds a text."""

import json
from typing import Any

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.fields import choose_field, list_names
from lmtrain.data.text.formats.text import LinesFormat
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block, RawBlock, first_chunk
from lmtrain.errors import DataError

DECODER = json.JSONDecoder()
_MISSING = object()


class JsonlFormat(Format):
    """Every line is a JSON string, or an object one of whose fields is a text; a blank line is an empty text."""

    lines_are_records = True

    def header(self, path: str) -> str:
        """Return the name of the field that holds the text, as the first record has it."""
        lines = normalise(first_chunk(path, self.keys.encoding).decode("utf-8", "replace")).split("\n")
        number = next((number for number, line in enumerate(lines) if line.strip()), 0)
        try:
            record = json.loads(lines[number])
        except (ValueError, RecursionError):
            return self.keys.field  # `parse` names the fault
        place = f"{path}:{number + 1}"
        return field_of(record, self.keys.field, place) if isinstance(record, dict) else self.keys.field

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
        return block._replace(texts=cleaned(texts), ended=True)

    def _text(self, line: str, field: str) -> str:
        """Return the text of a record; raises DataError with what follows the number of the line."""
        try:
            # two thirds of the time that `json.loads` takes, which allows for white space around an object
            record, end = DECODER.raw_decode(line) if line[0] == "{" else (None, 0)
            if end < len(line):
                record = json.loads(line)
        except json.JSONDecodeError as error:
            way = "; is it an array? data.format: json reads one" if line.lstrip().startswith("[") else ""
            raise DataError(f":{error.colno}: not JSON: {error.msg}{way}") from None
        except (RecursionError, ValueError):
            raise DataError(": not JSON that can be read: nested too deep, or a number too long") from None
        if isinstance(record, list):
            raise DataError(": an array, not a record; data.format: json reads a file that is one array")
        return text_of(record, field)


def field_of(record: dict[str, Any], wanted: str, place: str) -> str:
    """Return the name of the field of a record that holds its text; raises DataError with the place."""
    try:
        return choose_field(wanted, list(record), [name for name, value in record.items() if isinstance(value, str)])
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def text_of(record: Any, field: str) -> str:
    """Return the text of a record, as it stands; `cleaned` is for all texts of a block.

    A record that is a string is the text itself, and a field that is null is an empty text.

    Raises:
        DataError: the record has no such text; the message begins with a colon, for a place before it.
    """
    text = record.get(field, _MISSING) if isinstance(record, dict) else record
    if not isinstance(text, str):
        if text is None and isinstance(record, dict):
            return ""
        if not isinstance(record, dict):
            raise DataError(f": neither a text nor an object whose field {field!r} is text")
        if text is _MISSING:
            raise DataError(f": no field {field!r} (set data.field); it has {list_names(list(record))}")
        raise DataError(f": not an object whose field {field!r} is text")
    if "\0" in text:
        raise DataError(f": a NUL character in field {field!r}")
    return text


def cleaned(texts: list[str]) -> list[str]:
    """Return texts out of JSON in NFC, without the line breaks at their ends; they hold no NUL character."""
    if not texts:
        return []
    whole = "\0".join(texts).encode("utf-8", "replace").decode()  # \u escapes may hold half a surrogate pair
    return [text.strip("\n") for text in normalise(whole).split("\0")]
