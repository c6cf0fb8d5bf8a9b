"""From files to texts: lines, JSON records or ids, in bounded memory, every fault with its place.

Text is UTF-8 (a BOM is dropped, CRLF is one line end) and leaves here NFC-normalised; `.gz` files are read as they
are. To read is one thing, `raw_blocks`: bytes that end where a line does, a quarter of a mebibyte at a time, so memory
does not grow with the files. To parse them is another, and depends on nothing else: any process can do it.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from lmtrain.data.text.normalise import normalise
from lmtrain.errors import DataError

Format = Literal["text", "jsonl", "ids"]

BLOCK_BYTES = 1 << 18  # what is made of it fits into a processor's cache
LONGEST_LINE_BYTES = 16 << 20
# gzip reaches 1,032:1 on zeros; logs and text stay far below this
BOMB_RATIO, BOMB_BYTES = 400, 64 << 20


class RawBlock(NamedTuple):
    """Consecutive lines of one file as they stand there, the last one without its newline."""

    path: str
    first_line: int  # 1-based number of the first line
    offset: int  # of the first byte in the file, as unpacked
    data: bytes
    ended: bool = True  # whether a newline stands behind the last line
    read_bytes: int = 0  # of the file itself up to here; of all files, where a `Source` gives it
    file: int = 0  # which of the source's files
    last: bool = False  # whether it is the last one of the source

    @property
    def next_line(self) -> int:
        return self.first_line + self.data.count(b"\n") + 1

    @property
    def end(self) -> int:
        """The offset behind the lines."""
        return self.offset + len(self.data) + self.ended


class Block(NamedTuple):
    """Consecutive lines of one file."""

    path: str
    first_line: int  # 1-based number of the first line
    texts: list[str]
    ended: bool = True  # whether a newline stands behind the last one


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs name, each once, in sorted order within each glob.

    Raises:
        DataError: a pattern that names nothing.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"{pattern}: no such file")
        paths.update(dict.fromkeys(found))
    return list(paths)


def open_text(path: str) -> IO[bytes]:
    """Open a regular file; raises DataError, in words."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: a directory; name the files in it, for instance {os.path.join(path, '*.txt')}")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        link = " (the link points nowhere)" if os.path.islink(path) and not os.path.exists(path) else ""
        raise DataError(f"{path}: {(error.strerror or 'can not be read').lower()}{link}") from None


def too_long(path: str, line: int) -> DataError:
    """What is said of a line beyond `LONGEST_LINE_BYTES`."""
    return DataError(f"{path}:{line}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB; cut it into several")


def resolve_format(path: str, format: str) -> Format:
    """`auto` goes by the suffix, `.gz` aside: .jsonl is jsonl, anything else text."""
    if format != "auto":
        return cast(Format, format)
    return "jsonl" if Path(path.removesuffix(".gz")).suffix == ".jsonl" else "text"


def raw_blocks(path: str, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
    """The lines of a file, a block at a time.

    Args:
        offset, line: where a line begins from which on they are wanted.

    Raises:
        DataError: the file can't be read, is broken, changes meanwhile, or holds a line beyond 16 MiB.
    """
    with open_text(path) as handle:
        before = os.fstat(handle.fileno())
        for raw in _cut(path, _chunks(path, handle, offset), offset, line):
            yield raw._replace(read_bytes=handle.tell())
        if not os.path.exists(path) or _identity(before) != _identity(os.stat(path)):
            raise DataError(f"{path}: the file changed while it was read; start again when it is at rest")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_lines_of(handle: IO[bytes], name: str) -> Iterator[Block]:
    """The lines of what is open already, such as standard input.

    Raises:
        DataError: as `raw_blocks` and `parse`, under this name.
    """
    chunks = iter(lambda: handle.read(BLOCK_BYTES), b"")
    return (parse(raw, "text", "") for raw in _cut(name, chunks, 0, 1))


def _cut(path: str, chunks: Iterator[bytes], offset: int, line: int) -> Iterator[RawBlock]:
    carried: list[bytes] = []  # of a line that goes on
    size = 0
    for chunk in chunks:
        if offset == 0 and not size and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        whole, newline, rest = chunk.rpartition(b"\n")
        if newline:
            raw = RawBlock(path, line, offset, b"".join([*carried, whole]))
            yield raw
            line, offset, carried, size = raw.next_line, raw.end, [], 0
        carried.append(rest)
        size += len(rest)
        if size > LONGEST_LINE_BYTES:
            raise too_long(path, line)
    if size:
        yield RawBlock(path, line, offset, b"".join(carried), ended=False)


def _chunks(path: str, handle: IO[bytes], offset: int) -> Iterator[bytes]:
    if not path.endswith(".gz"):
        handle.seek(offset)
        while chunk := handle.read(BLOCK_BYTES):
            yield chunk
        return
    read_bytes = 0
    try:
        with gzip.open(handle) as unpacked:
            while chunk := unpacked.read(BLOCK_BYTES):
                read_bytes += len(chunk)
                if read_bytes > max(BOMB_BYTES, BOMB_RATIO * handle.tell()):  # by what it was unpacked from so far
                    raise DataError(f"{path}: unpacks to more than {BOMB_RATIO} times its size; unpack it yourself")
                if read_bytes > offset:
                    yield chunk[max(0, offset - read_bytes + len(chunk)) :]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip file: {error}") from None


def parse(raw: RawBlock, kind: Format, field: str) -> Block:
    """The texts of lines as they stand in a file: one a line, blank ones as empty ones or white space.

    Args:
        field: of a JSON record, that holds its text.

    Raises:
        DataError: not UTF-8, a NUL, or broken JSON, with its place.
    """
    text = decode(raw)
    lines = text.split("\n")
    if "\r" in text:
        lines = [each.removesuffix("\r") for each in lines]
    block = Block(raw.path, raw.first_line, lines, raw.ended)
    return _records(block, field) if kind == "jsonl" else block


def decode(raw: RawBlock) -> str:
    """The lines in one; raises DataError as `parse`."""
    path, line, offset, data = raw[:4]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(path, line, data[: error.start].decode("utf-8"))
        raise DataError(
            f"{place}: byte {offset + error.start} is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)"
        ) from None
    if "\0" in text:
        raise DataError(f"{_place(path, line, text[: text.index(chr(0))])}: a NUL character; is this a text file?")
    return normalise(text)


def _place(path: str, first_line: int, before: str) -> str:
    """FILE:LINE:COL of the character that follows `before`, which starts with line `first_line`."""
    return f"{path}:{first_line + before.count(chr(10))}:{len(before) - (before.rfind(chr(10)) + 1) + 1}"


def _records(block: Block, field: str) -> Block:
    texts = []
    for number, line in enumerate(block.texts, block.first_line):
        if not line.strip():
            texts.append("")
            continue
        try:
            record = json.loads(line)
            text = record[field]
            if not isinstance(text, str):
                raise TypeError
        except json.JSONDecodeError as error:
            raise DataError(f"{block.path}:{number}:{error.colno}: not JSON: {error.msg}") from None
        except KeyError:
            names = ", ".join(map(repr, list(record)[:5]))
            raise DataError(f"{block.path}:{number}: no field {field!r} (set data.field); it has {names}") from None
        except (TypeError, RecursionError, ValueError):
            raise DataError(f"{block.path}:{number}: not an object whose field {field!r} is text") from None
        if "\0" in text:
            raise DataError(f"{block.path}:{number}: a NUL character in field {field!r}")
        texts.append(normalise(text.encode("utf-8", "replace").decode()))  # lone surrogates out of \u escapes
    return block._replace(texts=texts, ended=True)
