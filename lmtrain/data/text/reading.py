"""Opens files and reads them a chunk of 256 KiB at a time, so that memory does not grow with the files.

Text is UTF-8 and is normalised to NFC when it is decoded; a BOM is left out. A file whose name ends in `.gz` is
unpacked as it is read. The formats (`formats/`) cut the chunks into blocks and parse these into texts.
"""

import glob
import gzip
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

from lmtrain.data.text.normalise import normalise
from lmtrain.errors import DataError

BLOCK_BYTES = 1 << 18  # a block of this size and what is made of it fit into a processor's cache
LONGEST_LINE_BYTES = 16 << 20
# gzip reaches 1,032:1 on zeros; logs and text stay far below this ratio
BOMB_RATIO, BOMB_BYTES = 400, 64 << 20


class RawBlock(NamedTuple):
    """Consecutive whole records of one file, as bytes that any process can parse."""

    path: str
    first_line: int  # 1-based number of the first line
    offset: int  # number of bytes before it in the file, as unpacked; a format may count otherwise (row groups)
    data: bytes  # the records, the last one without its newline
    end: int  # `offset` of the block that follows in the file
    next_line: int  # `first_line` of the block that follows
    ended: bool = True  # whether a newline stood behind the last record
    read_bytes: int = 0  # bytes of the file itself read so far; `Source` adds those of the files before it
    header: str = ""  # what a format needs of the file's beginning to parse the block
    file: int = 0  # index of the file in its source
    last: bool = False  # whether it is the source's last block


class Block(NamedTuple):
    """Consecutive texts of one file."""

    path: str
    lines: Sequence[int]  # 1-based number of the line in which each text begins
    texts: list[str]
    ended: bool = True  # whether a newline stood behind the last text


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths and globs name, each once, each glob's sorted; raises DataError if one names none."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file")
        paths.update(dict.fromkeys(matches))
    return list(paths)


def open_text(path: str) -> IO[bytes]:
    """Open a regular file; raises DataError that says why it can't be read."""
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


@contextmanager
def open_unchanged(path: str) -> Iterator[IO[bytes]]:
    """Open a regular file, and raise DataError at the end if it was changed meanwhile."""
    with open_text(path) as handle:
        before = os.fstat(handle.fileno())
        yield handle
        if not os.path.exists(path) or _identity(before) != _identity(os.stat(path)):
            raise DataError(f"{path}: the file changed while it was read; start again when it is at rest")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_chunks(handle: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """Read what is left of an open file, `BLOCK_BYTES` at a time."""
    return iter(lambda: handle.read(BLOCK_BYTES), b"")


def read_file(path: str, handle: IO[bytes], offset: int) -> Iterator[bytes]:
    """Read an open file from an offset on, `.gz` unpacked, in chunks; raises DataError for broken gzip or a bomb."""
    if not path.endswith(".gz"):
        handle.seek(offset)
        yield from read_chunks(handle)
        return
    unpacked_bytes = 0
    try:
        with gzip.open(handle) as unpacked:
            for chunk in read_chunks(unpacked):
                unpacked_bytes += len(chunk)
                if unpacked_bytes > max(BOMB_BYTES, BOMB_RATIO * handle.tell()):  # tell: packed bytes read so far
                    raise DataError(f"{path}: unpacks to more than {BOMB_RATIO} times its size; unpack it yourself")
                if unpacked_bytes > offset:
                    yield chunk[max(0, offset - unpacked_bytes + len(chunk)) :]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: broken gzip file: {error}") from None


def decode(raw: RawBlock) -> str:
    """Return the text of a block, normalised; raises DataError with the place of a byte that is not UTF-8, or a NUL."""
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(raw, raw.data[: error.start].decode("utf-8"))
        raise DataError(
            f"{place}: byte {raw.offset + error.start} is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)"
        ) from None
    if "\0" in text:
        raise DataError(f"{_place(raw, text[: text.index(chr(0))])}: a NUL character; is this a text file?")
    return normalise(text)


def _place(raw: RawBlock, before: str) -> str:
    """FILE:LINE:COL of the character that follows `before` in a block."""
    return f"{raw.path}:{raw.first_line + before.count(chr(10))}:{len(before) - (before.rfind(chr(10)) + 1) + 1}"


def too_long(path: str, line: int) -> DataError:
    """Return the error for a line or record of more than `LONGEST_LINE_BYTES`."""
    return DataError(f"{path}:{line}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB; cut it into several")
