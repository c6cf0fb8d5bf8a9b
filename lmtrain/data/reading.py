"""From files to texts: lines, JSON records or ids, in bounded memory, every fault with its place.

Text is UTF-8 (a BOM is dropped, CRLF is one line end) and leaves here NFC-normalised; `.gz` files are read as they
are. Files are read in blocks of about a mebibyte, so memory does not grow with them.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from lmtrain.data.tokenizer import normalise
from lmtrain.errors import DataError

Format = Literal["text", "jsonl", "ids"]

BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 16 << 20
# gzip reaches 1,032:1 on zeros; logs and text stay far below this
BOMB_RATIO, BOMB_BYTES = 400, 64 << 20


class Block(NamedTuple):
    """Consecutive lines of one file."""

    path: str
    first_line: int  # 1-based number of the first line
    texts: list[str]
    blank: int = 0  # how many of the texts hold white space at most
    ended: bool = True  # whether a newline stands behind the last one


def expand(patterns: Sequence[str]) -> list[str]:
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


def content_hash(path: str) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        DataError: not a file that can be read.
    """
    with _open(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]


def _open(path: str) -> IO[bytes]:
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


def resolve_format(path: str, format: str) -> Format:
    """`auto` goes by the suffix, `.gz` aside: .jsonl is jsonl, anything else text."""
    if format != "auto":
        return cast(Format, format)
    return "jsonl" if Path(path.removesuffix(".gz")).suffix == ".jsonl" else "text"


def read_texts(paths: Sequence[str], format: str = "auto", jsonl_field: str = "text") -> Iterator[Block]:
    """The texts of all files in order, a block at a time; blank ones are there as empty texts.

    Raises:
        DataError: a file that can't be read, is not UTF-8, holds a NUL, a line beyond 16 MiB, or broken JSON.
    """
    for path in paths:
        before = os.stat(path) if os.path.exists(path) else None
        kind = resolve_format(path, format)
        for block in _read_lines(path, _chunks(path)):
            if kind == "jsonl":
                block = _records(block, jsonl_field)
            yield block._replace(blank=sum(not text.strip() for text in block.texts))
        after = os.stat(path)
        if before is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{path}: the file changed while it was read; start again when it is at rest")


def read_lines_of(handle: IO[bytes], name: str) -> Iterator[Block]:
    """The lines of what is open already, such as standard input; raises DataError as `read_texts`, under this name."""
    return _read_lines(name, iter(lambda: handle.read(BLOCK_BYTES), b""))


def _read_lines(path: str, chunks: Iterator[bytes]) -> Iterator[Block]:
    line, offset, carried = 1, 0, b""
    for chunk in chunks:
        if offset == 0 and not carried and chunk.startswith(codecs.BOM_UTF8):
            chunk, offset = chunk.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        whole, newline, rest = chunk.rpartition(b"\n")
        if newline:
            block = _decode(path, line, offset, carried + whole)
            yield block
            line += len(block.texts)
            offset += len(carried) + len(whole) + 1
            carried = rest
        else:
            carried += rest
        if len(carried) > LONGEST_LINE_BYTES:
            raise DataError(f"{path}:{line}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB; cut it into several")
    if carried:
        yield _decode(path, line, offset, carried)._replace(ended=False)


def _chunks(path: str) -> Iterator[bytes]:
    with _open(path) as handle:
        if not path.endswith(".gz"):
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
                    yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: broken gzip file: {error}") from None


def _decode(path: str, line: int, offset: int, data: bytes) -> Block:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(path, line, data[: error.start].decode("utf-8"))
        raise DataError(
            f"{place}: byte {offset + error.start} is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)"
        ) from None
    if "\0" in text:
        raise DataError(f"{_place(path, line, text[: text.index(chr(0))])}: a NUL character; is this a text file?")
    lines = normalise(text).split("\n")
    if "\r" in text:
        lines = [each.removesuffix("\r") for each in lines]
    return Block(path, line, lines)


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
            raise DataError(
                f"{block.path}:{number}: no field {field!r} (set data.jsonl_field); it has {names}"
            ) from None
        except (TypeError, RecursionError, ValueError):
            raise DataError(f"{block.path}:{number}: not an object whose field {field!r} is text") from None
        if "\0" in text:
            raise DataError(f"{block.path}:{number}: a NUL character in field {field!r}")
        texts.append(normalise(text.encode("utf-8", "replace").decode()))  # lone surrogates out of \u escapes
    return block._replace(texts=texts, ended=True)
