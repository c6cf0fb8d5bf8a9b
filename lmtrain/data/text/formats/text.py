"""Plain text: every line is a text."""

from collections.abc import Iterator
from typing import IO

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.reading import Block, RawBlock, decode, read_chunks


class TextFormat(Format):
    """Every line is a text; a blank line is an empty text or one of white space."""

    lines_are_records = True

    def parse(self, raw: RawBlock) -> Block:
        text = decode(raw)
        lines = text.split("\n")
        if "\r" in text:
            lines = [line.removesuffix("\r") for line in lines]
        return Block(raw.path, range(raw.first_line, raw.first_line + len(lines)), lines, raw.ended)

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        return [decode(raw)]


def read_lines_of(handle: IO[bytes], name: str) -> Iterator[Block]:
    """Read the lines of an open binary file, such as standard input; raises DataError with this name and the line."""
    lines = TextFormat(field="")
    return map(lines.parse, lines.cut(name, read_chunks(handle)))
