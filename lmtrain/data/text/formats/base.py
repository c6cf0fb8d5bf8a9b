"""The base class of file formats: it says how a file is cut into blocks of whole records, and which texts they hold."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

from lmtrain.data.text.reading import LONGEST_LINE_BYTES, Block, RawBlock, open_unchanged, read_file, too_long


class Format(ABC):
    """One file format. The table in `table.py` gives it its name.

    One process reads a file and cuts it into blocks (`raw_blocks`); any process parses a block (`parse`). Each block
    says at which place the next one begins, so reading can be continued there later. By default records are lines.
    Override `record_ends` for records that end elsewhere (a newline in quotes, a paragraph). Override `raw_blocks` for
    a file with a header, or one that is not read from front to back (Parquet: an offset may number a row group).

    Args:
        field: name of the field that holds the text of a record.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()  # file names with these have this format under `data.format: auto`
    lines_are_records: ClassVar[bool] = False  # whether a record begins after every newline

    def __init__(self, field: str) -> None:
        self.field = field

    @abstractmethod
    def parse(self, raw: RawBlock) -> Block:
        """Return the texts of a block; raises DataError with the place of its first fault."""

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        """Return strings with the words of a block, in order. They need not be cut where one text ends."""
        return self.parse(raw).texts

    def record_ends(self) -> Callable[[bytes], int]:
        """Return a function to call with one chunk of a file after the other, from the beginning of a record on.

        It returns how many bytes of the chunk belong to records that end in the chunk; the others begin a record, or
        continue one, that ends in a later chunk.
        """
        return lambda chunk: chunk.rfind(b"\n") + 1

    def raw_blocks(self, path: str, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """Read a file a block at a time.

        Args:
            offset, line: where to begin: `end` and `next_line` of an earlier block.

        Raises:
            DataError: the file can't be read, is broken, changes meanwhile, or has a record of more than 16 MiB.
        """
        with open_unchanged(path) as handle:
            for raw in self.cut(path, read_file(path, handle, offset), offset, line):
                yield raw._replace(read_bytes=handle.tell())

    def cut(self, path: str, chunks: Iterable[bytes], offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """Cut chunks of bytes into blocks of whole records; raises DataError if a record has more than 16 MiB.

        Args:
            path: name for messages.
            offset, line: place of the first byte.
        """
        carried: list[bytes] = []  # the beginning of a record that no chunk has ended so far
        size, find_end = 0, self.record_ends()
        for chunk in chunks:
            if offset == 0 and not size and chunk.startswith(codecs.BOM_UTF8):
                chunk, offset = chunk.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            if end := find_end(chunk):
                ended = chunk.endswith(b"\n", 0, end)
                raw = _block(path, line, offset, b"".join([*carried, chunk[: end - ended]]), ended)
                yield raw
                line, offset, carried, size = raw.next_line, raw.end, [], 0
            carried.append(chunk[end:])
            size += len(chunk) - end
            if size > LONGEST_LINE_BYTES:
                raise too_long(path, line)
        if size:
            yield _block(path, line, offset, b"".join(carried), ended=False)


def _block(path: str, line: int, offset: int, data: bytes, ended: bool) -> RawBlock:
    end, next_line = offset + len(data) + ended, line + data.count(b"\n") + ended
    return RawBlock(path, line, offset, data, end, next_line, ended)
