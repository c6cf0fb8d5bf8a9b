"""JSON: a file holds one array, whose elements are strings or records with a text."""

import json
import re
from contextlib import suppress

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.jsonl import field_of, text_of
from lmtrain.data.text.reading import Block, RawBlock, decode, first_chunk
from lmtrain.errors import DataError

_PARTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}",]', re.DOTALL)  # a whole string, or a sign
_SPACE = re.compile(r"[\s\ufeff]*")
_DECODER = json.JSONDecoder()


class JsonArrayFormat(Format):
    """Each element of the array is a text, or an object one of whose fields is."""

    record = "element"

    def header(self, path: str) -> str:
        """Return the name of the field, "" for strings; raises DataError if the file holds no array."""
        head = first_chunk(path, self.keys.encoding).decode("utf-8", "replace")
        start = _SPACE.match(head).end()  # type: ignore[union-attr]  # matches anywhere
        line = 1 + head.count("\n", 0, start)
        if head[start : start + 1] != "[":
            raise DataError(f"{path}:{line}: {_what_it_is(head[start:])}")
        try:
            first, _ = _DECODER.raw_decode(head, _SPACE.match(head, start + 1).end())  # type: ignore[union-attr]
        except (ValueError, RecursionError):
            return self.keys.field  # `parse` names the fault
        return field_of(first, self.keys.field, f"{path}:{line}") if isinstance(first, dict) else ""

    def details(self, header: str) -> str:
        return f"field {header!r} of each element of an array" if header else "each string of an array"

    def record_end(self, data: bytes) -> int:
        """Elements end at a comma; the last one stays together with the bracket that ends the array."""
        depth, end = 0, 0
        for part in _PARTS.finditer(data):
            sign = data[part.start()]
            if sign in b"[{":
                is_array = sign == ord("[") and not data[: part.start()].strip()
                depth += not is_array
            elif sign in b"]}":
                depth -= 1
            elif sign == ord(",") and depth == 0:
                end = part.end()
            elif part[0] == b'"':  # of a string that is not closed so far
                break
        return end

    def parse(self, raw: RawBlock) -> Block:
        text = decode(raw)
        lines: list[int] = []
        texts: list[str] = []
        place, line, counted, is_closed = _skip(text, 0), raw.first_line, 0, False
        field = raw.header or self.keys.field
        if raw.offset == 0 and text[place : place + 1] == "[":
            place = _skip(text, place + 1)
        while place < len(text):
            line, counted = line + text.count("\n", counted, place), place
            if text[place] == "]":
                if rest := text[place + 1 :].strip():
                    raise DataError(f"{raw.path}:{line}: {rest[:20]!r} stands behind the end of the array")
                is_closed = True
                break
            try:
                element, place = _DECODER.raw_decode(text, place)
                texts.append(text_of({field: element} if isinstance(element, str) else element, field))
            except json.JSONDecodeError as error:
                line += text.count("\n", counted, error.pos)
                column = error.pos - text.rfind("\n", 0, error.pos)
                raise DataError(f"{raw.path}:{line}:{column}: not JSON: {error.msg}") from None
            except (RecursionError, ValueError):
                raise DataError(f"{raw.path}:{line}: not JSON that can be read: nested too deep") from None
            except DataError as error:
                raise DataError(f"{raw.path}:{line}{error}") from None
            lines.append(line)
            place = _skip(text, place)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] not in ("]", ""):
                raise DataError(f"{raw.path}:{line}: a comma is missing behind the element that begins here")
        if not is_closed and (raw.last or not text.rstrip().endswith(",")):
            raise DataError(f"{raw.path}: the array is not closed; is the file cut short?")
        return Block(raw.path, lines, texts)


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # matches anywhere


def _what_it_is(head: str) -> str:
    """Say what a file holds instead of an array."""
    if not head.startswith("{"):
        return "not a JSON array"
    with suppress(ValueError):
        json.loads(head.partition("\n")[0])
        return "JSON lines, not an array; data.format: jsonl reads them"
    return "one object, not an array of records; write the array that holds the records into a file of its own"
