"""FASTA: sequences of letters below header lines that begin with `>`, as proteins and DNA come."""

import re

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.reading import Block, RawBlock, decode
from lmtrain.errors import DataError

_INNER_LINE_END = re.compile(rb"\n(?=[^>;\s])")  # what follows holds letters


class FastaFormat(Format):
    """Each record is a text: its lines without the header, joined without white space. `;` begins a comment line.

    In a stream a record may have any length.
    """

    record, may_be_cut = "record", True

    def details(self, header: str) -> str:
        return "each record is a sequence, without its header, its lines joined"

    def record_end(self, data: bytes) -> int:
        return data.rfind(b"\n>") + 1

    def inner_end(self, data: bytes) -> int:
        ends = [found.end() for found in _INNER_LINE_END.finditer(data, max(0, len(data) - 4096))]
        header_end = data.find(b"\n") + 1 if data.startswith(b">") else 0
        return ends[-1] if ends and ends[-1] > header_end else 0

    def parse(self, raw: RawBlock) -> Block:
        lines: list[int] = []
        parts: list[list[str]] = []
        for number, line in enumerate(decode(raw).split("\n"), raw.first_line):
            if line.startswith(">"):
                lines.append(number)
                parts.append([])
            elif line.strip() and not line.startswith(";"):
                if not parts:
                    if raw.offset == 0:
                        raise DataError(f"{raw.path}:{number}: text before the first header line, which begins with >")
                    lines.append(number)  # the block continues a record
                    parts.append([])
                parts[-1] += line.split()
        return Block(raw.path, lines, ["".join(part) for part in parts], raw.ended)
