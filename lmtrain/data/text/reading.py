"""Opens files and reads them a chunk of about 256 KiB at a time, so that memory does not grow with the files.

A chunk is UTF-8, whatever the file's encoding, without a byte order mark, and each line in it ends in `\\n`. Packed
files are unpacked as they are read. The formats (`formats/`) cut the chunks into blocks and parse these into texts,
which are normalised to NFC.
"""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO, NamedTuple

from lmtrain.data.text.encodings import encoding_of, likely_encoding, to_utf8
from lmtrain.data.text.kinds import files_below, refuse_other_kinds
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.unpacking import unpack
from lmtrain.errors import DataError

BLOCK_BYTES = 1 << 18  # a block of this size and what is made of it fit into a processor's cache
LONGEST_RECORD_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r(?:\r?\n)?")  # `\r\r\n` is a text that was written in text mode twice
BEGINNING_BYTES = 1 << 16  # from which it is known how a file is to be read


class RawBlock(NamedTuple):
    """Consecutive whole records of one file, as bytes that any process can parse."""

    path: str
    first_line: int  # 1-based number of the first line
    offset: int  # number of bytes before it in the file's chunks; a format may count otherwise (rows)
    data: bytes  # the records, the last one without its newline
    end: int  # `offset` of the block that follows in the file
    next_line: int  # `first_line` of the block that follows
    ended: bool = True  # whether the last record has ended; False if the file ends without a newline
    unfinished: bool = False  # whether the last record continues in the block that follows (a stream's long line)
    read_bytes: int = 0  # bytes of the file itself read so far; `Source` adds those of the files before it
    format: str = "text"  # the name of the file's format
    header: str = ""  # what a format needs of the file's beginning to parse the block
    file: int = 0  # index of the file in its source
    last: bool = False  # whether it is the source's last block


class Block(NamedTuple):
    """Consecutive texts of one file."""

    path: str
    lines: Sequence[int]  # 1-based number of the line in which each text begins
    texts: list[str]
    ended: bool = True  # whether the last text has ended; False if the file ends without a newline


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths, globs and directories name, each once; those of a glob or directory are sorted.

    Raises DataError if one names no file.
    """
    return list(dict.fromkeys(_matches(patterns)))


def repeated_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths, globs and directories name more than once; each is read once nevertheless."""
    return [path for path, times in Counter(_matches(patterns)).items() if times > 1]


def _matches(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"{pattern}: no such file")
        for match in matches:
            yield from files_below(match) if os.path.isdir(match) else [match]


def open_text(path: str) -> IO[bytes]:
    """Open a regular file; raises DataError that says why it can't be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
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


def read_chunks(name: str, handle: IO[bytes], encoding: str, offset: int = 0) -> Iterator[bytes]:
    """Read an open file in chunks of UTF-8, as the head of this page describes them.

    Args:
        name: the file, for messages; a name with a suffix such as `.gz` is unpacked.
        encoding: that of the file; a UTF-16 or UTF-32 byte order mark goes before it.
        offset: bytes of the chunks that are left out at the beginning.

    Raises:
        DataError: the file is broken, of a kind that holds no text (a workbook, an archive), or not in this encoding.
    """
    chunks = unpack(name, handle, BLOCK_BYTES)
    head = next(chunks, b"")
    refuse_other_kinds(name, head)
    for chunk in _with_newlines(to_utf8(name, chain([head], chunks), encoding)):
        if offset < len(chunk):
            yield chunk[offset:] if offset else chunk
        offset = max(0, offset - len(chunk))


def first_chunk(path: str, encoding: str) -> bytes:
    """Return the first 64 KiB or more of a file's chunks; raises DataError as `read_chunks` and `open_text` do."""
    head = b""
    with open_text(path) as handle:
        for chunk in read_chunks(path, handle, encoding):
            head += chunk
            if len(head) >= BEGINNING_BYTES:
                break
    return head


def read_encoding(name: str, handle: IO[bytes], encoding: str) -> str:
    """Return the encoding of an open file: that of its byte order mark, or else the given one."""
    return encoding_of(next(unpack(name, handle, BLOCK_BYTES), b""), encoding)


def _with_newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """End each line in `\\n`, whether it ended in `\\n`, `\\r\\n`, `\\r` or `\\r\\r\\n`."""
    held = b""  # up to two carriage returns, which a newline may follow
    for chunk in chunks:
        if held or b"\r" in chunk:
            chunk = held + chunk
            held = chunk[len(chunk[-2:].rstrip(b"\r")) + len(chunk[:-2]) :]
            # splitting and joining is faster than a substitution
            chunk = b"\n".join(_LINE_END.split(chunk[: len(chunk) - len(held)]))
        yield chunk
    yield held.replace(b"\r", b"\n")


def decode(raw: RawBlock) -> str:
    """Return the text of a block, normalised; raises DataError with the place of a byte that is not UTF-8, or a NUL."""
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(raw, raw.data[: error.start].decode("utf-8"))
        fault = f"{place}: not UTF-8 (byte 0x{raw.data[error.start]:02x})"
        raise DataError(f"{fault}; {likely_encoding(raw.data, error.start)}") from None
    if "\0" in text:
        place = _place(raw, text[: text.index("\0")])
        raise DataError(f"{place}: a NUL character; {likely_encoding(raw.data, raw.data.index(0))}")
    return normalise(text)


def _place(raw: RawBlock, before: str) -> str:
    """FILE:LINE:COL of the character that follows `before` in a block."""
    return f"{raw.path}:{raw.first_line + before.count(chr(10))}:{len(before) - (before.rfind(chr(10)) + 1) + 1}"
