"""The base class of file formats: it says how a file is cut into blocks of whole records, and which texts they hold."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

from lmtrain.data.text import reading
from lmtrain.data.text.formats.fields import DEFAULT_FIELD
from lmtrain.data.text.reading import LONGEST_RECORD_BYTES, Block, RawBlock, open_unchanged, read_chunks
from lmtrain.errors import DataError


class Keys(NamedTuple):
    """The keys of `data` that say how files are to be read (`config/schema.py`)."""

    format: str = "auto"
    field: str = DEFAULT_FIELD
    separator: str = "line"
    encoding: str = "utf-8"
    stream: bool = False  # `batching.mode: stream`


class Format(ABC):
    """One file format. The table in `table.py` gives it its name.

    One process reads a file and cuts it into blocks (`raw_blocks`); any process parses a block (`parse`). Each block
    says at which place the next one begins, so reading can be continued there later. `record_end` says where records
    end. Override `header` for a file whose beginning tells how the rest is read (a table), and `raw_blocks` for a file
    that is not read from front to back as text (Parquet).

    Args:
        keys: how files are to be read.
    """

    record: ClassVar[str] = "line"  # the word for one record in messages
    lines_are_records: ClassVar[bool] = False  # whether a record begins after every newline
    ends_with_file: ClassVar[bool] = True  # whether the end of the file ends its last record
    may_be_cut: ClassVar[bool] = False  # whether a stream's record may have any length: see `inner_end`

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    @abstractmethod
    def parse(self, raw: RawBlock) -> Block:
        """Return the texts of a block; raises DataError with the place of its first fault."""

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        """Return strings with the words of a block, in order. They need not be cut where one text ends."""
        return self.parse(raw).texts

    def header(self, path: str) -> str:
        """Return what `parse` needs of the beginning of a file; raises DataError if the file can't be read by it."""
        return ""

    def details(self, header: str) -> str:
        """Describe how a file with this header is read, for `lmtrain check`: `cells between ';', field 'text'`."""
        return ""

    def record_end(self, data: bytes) -> int:
        """Return how many of these bytes, which begin where a record begins, belong to records that end in them."""
        return data.rfind(b"\n") + 1

    def raw_blocks(self, path: str, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """Read a file a block at a time.

        Args:
            offset, line: where to begin: `end` and `next_line` of an earlier block.

        Raises:
            DataError: the file can't be read, is broken, changes meanwhile, or has a record of more than 16 MiB.
        """
        header = self.header(path)
        with open_unchanged(path) as handle:
            chunks = read_chunks(path, handle, self.keys.encoding, offset)
            for raw in self.cut(path, chunks, offset, line):
                yield raw._replace(read_bytes=handle.tell(), header=header)

    def cut(self, path: str, chunks: Iterable[bytes], offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """Cut chunks into blocks of whole records. In a stream a long record may go on in the block that follows.

        Args:
            path: name for messages.
            offset, line: place of the first byte.

        Raises:
            DataError: a record has more than 16 MiB.
        """
        parts: list[bytes] = []  # what no block holds so far: it begins with a record
        size = next_size = 0
        for chunk in chunks:
            parts.append(chunk)
            size += len(chunk)
            if size < next_size:
                continue
            data = b"".join(parts)
            end = self.record_end(data)
            unfinished = not end and size >= reading.BLOCK_BYTES and self.keys.stream
            if unfinished:
                end = self.inner_end(data)
            if end:
                raw = self._block(path, line, offset, data[:end], unfinished)
                yield raw
                line, offset, data = raw.next_line, raw.end, data[end:]
            elif size > LONGEST_RECORD_BYTES:
                raise self.too_long(path, line)
            parts, size = [data], len(data)
            # a long record is looked at again when it is twice as long, so the work stays in proportion to its length
            next_size = 0 if end else min(2 * size, LONGEST_RECORD_BYTES + 1)
        if size:
            yield self._block(path, line, offset, b"".join(parts), False)

    def inner_end(self, data: bytes) -> int:
        """Return where a record of a stream that is longer than a block is cut in two; 0: nowhere so far.

        Only a format whose `parse` can read a part of a record overrides this.
        """
        return 0

    def too_long(self, path: str, line: int) -> DataError:
        """Return the error for a record of more than 16 MiB."""
        return DataError(
            f"{path}:{line}: a {self.record} of more than {LONGEST_RECORD_BYTES >> 20} MiB; cut it into several"
            + (", or read the text with batching.mode: stream" if self.may_be_cut and not self.keys.stream else "")
        )

    def _block(self, path: str, line: int, offset: int, data: bytes, unfinished: bool) -> RawBlock:
        end, next_line, has_newline = offset + len(data), line + data.count(b"\n"), data.endswith(b"\n")
        if self.lines_are_records:
            data = data.removesuffix(b"\n")
        ended = not unfinished and (has_newline or self.ends_with_file)
        return RawBlock(path, line, offset, data, end, next_line, ended, unfinished)
