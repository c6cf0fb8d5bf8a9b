"""Unpacks files (`.gz`, `.bz2`, `.xz`, `.zst`) as they are read, within bounds."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any

from lmtrain.errors import DataError

# zeros are packed 1,000 times and more; logs and text stay far below this ratio
BOMB_RATIO, BOMB_BYTES = 400, 64 << 20
LARGEST_WINDOW_BYTES = 1 << 27  # memory that a .zst may ask for
PACKED_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_BEGINNINGS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def inner_suffix(name: str) -> str:
    """Return the suffix of a file in lower case; of a packed file (`a.CSV.gz`) the one before: `.csv`."""
    path = PurePath(name)
    if path.suffix.lower() in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def packing_of(name: str, handle: IO[bytes]) -> str | None:
    """Return how an open file is packed, by its suffix or its first bytes; None if it is not."""
    head = handle.read(6)
    handle.seek(0)
    by_content = next((kind for begin, kind in _BEGINNINGS.items() if head.startswith(begin)), None)
    if by_content == "bzip2" and not head[3:4].isdigit():
        by_content = None
    return PACKED_SUFFIXES.get(PurePath(name).suffix.lower(), by_content)


def unpack(name: str, handle: IO[bytes], chunk_bytes: int) -> Iterator[bytes]:
    """Read a file in chunks, unpacked if it is packed; raises DataError if the packed file is broken, or a bomb."""
    kind = packing_of(name, handle) if handle.seekable() else None
    if kind is None:
        yield from iter(lambda: handle.read(chunk_bytes), b"")
        return
    unpacked_bytes = 0
    try:
        for chunk in _unpacked(kind, handle, chunk_bytes):
            unpacked_bytes += len(chunk)
            if unpacked_bytes > max(BOMB_BYTES, BOMB_RATIO * handle.tell()):  # tell: packed bytes read so far
                raise DataError(f"{name}: unpacks to more than {BOMB_RATIO} times its size; unpack it yourself")
            yield chunk
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise DataError(f"{name}: broken {kind} file: {error}") from None


def _unpacked(kind: str, handle: IO[bytes], chunk_bytes: int) -> Iterator[bytes]:
    if kind == "zstd":
        yield from _zstd_frames(handle)
        return
    openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    with openers[kind](handle) as unpacked:
        yield from iter(lambda: unpacked.read(chunk_bytes), b"")


def _zstd_frames(handle: IO[bytes]) -> Iterator[bytes]:
    """Unpack frame after frame; raises EOFError if the last one is cut short, which zstandard's reader passes over."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
    frame, is_inside = unpacker.decompressobj(), False
    while packed := handle.read(1 << 12):  # a few bytes may unpack to very many
        while packed:
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            packed, is_inside = frame.unused_data, not frame.eof
            if frame.eof:
                frame = unpacker.decompressobj()
    if is_inside:
        raise EOFError("it ends too early")
