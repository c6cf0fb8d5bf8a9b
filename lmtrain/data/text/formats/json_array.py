"""JSON: a file holds one array, whose elements are strings or records with a text."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.fields import list_names
from lmtrain.data.text.formats.jsonl import DECODER, cleaned, field_of, text_of
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block, RawBlock, decode, first_chunk
from lmtrain.errors import DataError

DEEPEST = 4  # brackets within brackets that one match of `_PARTS` takes; deeper ones take several
SHOWN_CHARACTERS = 30  # of an element at fault
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SPACE = re.compile(r"\s*")


def _brackets(depth: int) -> bytes:
    """Return a pattern for an object or array with what it holds, down to this depth."""
    inner = b"|" + _brackets(depth - 1) if depth else b""
    return rb'[\[{](?:[^][{}"]++|' + _STRING + inner + rb")*+[\]}]"


# a string, an object or an array as a whole, or else a sign; a comma behind a comma ends no element
_PARTS = re.compile(_STRING + b"|" + _brackets(DEEPEST) + rb'|[][{}"]|(?<![,[]),', re.DOTALL)


class JsonArrayFormat(Format):
    """Each element of the array is a text, or an object one of whose fields is.

    Blocks end before a comma between two elements; so only the first block begins with the bracket.
    """

    record = "record"

    def header(self, path: str) -> str:
        """Return the name of the field, "" for strings; raises DataError if the file holds no array."""
        head = normalise(first_chunk(path, self.keys.encoding).decode("utf-8", "replace"))
        start = _skip(head, 0)
        if head[start : start + 1] != "[":
            raise DataError(f"{path}:{1 + head.count(chr(10), 0, start)}: {_what_it_is(head[start:])}")
        start = _skip(head, start + 1)
        try:
            first, _ = DECODER.raw_decode(head, start)
        except (ValueError, RecursionError):
            return self.keys.field  # `parse` names the fault
        if not isinstance(first, dict):
            return ""
        return field_of(first, self.keys.field, f"{path}:{1 + head.count(chr(10), 0, start)}")

    def details(self, header: str) -> str:
        return f"field {header!r} of each element of an array" if header else "each string of an array"

    def record_end(self, data: bytes) -> int:
        opening, depth, end = re.match(rb"\s*\[", data), 0, 0
        for part in _PARTS.finditer(data, opening.end() if opening else 0):
            match part[0]:
                case b"[" | b"{":
                    depth += 1
                case b"]" | b"}":
                    depth -= 1
                case b"," if depth == 0:
                    end = part.start()
                case b'"':  # of a string that is not closed so far
                    break
        return end

    def cut(self, path: str, chunks: Iterable[bytes], offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        raw = None
        for raw in super().cut(path, chunks, offset, line):
            yield raw
        if raw is not None and not raw.data.rstrip().endswith(b"]"):
            raise DataError(f"{path}:{raw.next_line}: the array is not closed; is the file cut short?")

    def parse(self, raw: RawBlock) -> Block:
        text = decode(raw)
        lines: list[int] = []
        texts: list[str] = []
        line, counted = raw.first_line, 0
        place = _skip(text, _skip(text, 0) + 1)  # behind the bracket or the comma with which a block begins
        while place < len(text) and text[place] != "]":
            begin = place
            line, counted = line + text.count("\n", counted, begin), begin
            try:
                element, place = DECODER.raw_decode(text, begin)
                texts.append(text_of(element, raw.header or self.keys.field))
            except (ValueError, RecursionError, DataError) as error:
                raise _fault(raw, text, begin, error) from None
            lines.append(line)
            place = _skip(text, place)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] not in ("]", ""):
                raise _fault(raw, text, begin, DataError(": a comma is missing behind this element"))
        if rest := text[place + 1 :].strip():
            line += text.count("\n", counted, place)
            raise DataError(f"{raw.path}:{line}: {rest[:SHOWN_CHARACTERS]!r} stands behind the end of the array")
        return Block(raw.path, lines, cleaned(texts))


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # matches anywhere


def _fault(raw: RawBlock, text: str, begin: int, error: Exception) -> DataError:
    """Return the error of the element that begins at `begin`; the message shows it, since a file may be one line."""
    fault, place = str(error), begin
    if isinstance(error, json.JSONDecodeError):
        fault, place = f": not JSON: {error.msg}", error.pos
    elif not isinstance(error, DataError):
        fault = ": not JSON that can be read: nested too deep, or a number too long"
    line, line_start = raw.first_line + text.count("\n", 0, place), text.rfind("\n", 0, place) + 1
    # a block may begin within a line, and the column is not known there
    column = f":{place - line_start + 1}" if line_start or raw.offset == 0 else ""
    shown = text[begin : begin + SHOWN_CHARACTERS].partition("\n")[0]
    return DataError(f"{raw.path}:{line}{column}{fault}, in {shown!r}")


def fields_with_records(record: dict[str, Any]) -> list[str]:
    """Return the names of the fields of an object that hold an array of objects."""
    return [name for name, value in record.items() if isinstance(value, list) and isinstance((value or [0])[0], dict)]


def _what_it_is(head: str) -> str:
    """Say what a file that begins like this holds instead of an array."""
    if not head.startswith("{"):
        return "not a JSON array"
    try:
        record, end = DECODER.raw_decode(head)
    except (ValueError, RecursionError):  # longer than the beginning of the file, or broken
        record, end = {}, len(head)
    if head[end:].strip():
        return "JSON lines, not an array; data.format: jsonl reads them"
    names = fields_with_records(record)
    named = f" ({list_names(names)})" if names else ""
    return f"an object, not an array; write one of its arrays{named} into a file of its own"
