"""Excerpts of files that are too large to be read before anything is known of them: pieces from all over them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple

from lmtrain.config import Config
from lmtrain.data.text.reading import LONGEST_LINE_BYTES, expand_patterns, open_text, too_long
from lmtrain.errors import DataError

EXCERPT_BYTES = 8 << 20  # of all the files of a corpus
PIECE_BYTES = 128 << 10  # at one place
PACKED_FILES = 16  # of which the beginning is read


class Excerpt(NamedTuple):
    """What was taken of a corpus; or all of it, where that is little."""

    files: list[str]
    places: dict[str, str]  # of each file: where in the corpus it was taken from, for people
    taken_bytes: int
    all_bytes: int  # of the corpus; what is packed counted as unpacked, about

    @property
    def scale(self) -> float:
        """How many times as large the corpus is."""
        return self.all_bytes / max(1, self.taken_bytes)


class Excerpts(NamedTuple):
    """A configuration on excerpts of its corpora, with a cache of its own."""

    config: Config
    of: dict[str, Excerpt]  # by train, valid, test

    def named(self, fault: str) -> str:
        """A fault, with the user's own file in place of an excerpt's."""
        for excerpt in self.of.values():
            for file, place in excerpt.places.items():
                fault = fault.replace(file, place)
        return fault


def size_of(config: Config) -> int:
    """Bytes of all data files, as they lie on disk.

    Raises:
        DataError: a path or glob that names nothing.
    """
    data = config.data
    files = {
        file for paths in (data.train, data.valid, data.test) if paths is not None for file in expand_patterns(paths)
    }
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


@contextmanager
def excerpts_of(config: Config) -> Iterator[Excerpts]:
    """Excerpts of the corpora of a configuration, in a directory that is gone afterwards.

    Raises:
        DataError: files that can't be read.
    """
    with TemporaryDirectory(prefix="lmtrain-check-") as folder:
        taken: dict[str, Excerpt] = {}
        faults: list[str] = []
        for name in ("train", "valid", "test"):
            if (paths := getattr(config.data, name)) is not None:
                (home := Path(folder) / name).mkdir()
                try:
                    taken[name] = _take(expand_patterns(paths), home)
                except DataError as error:
                    faults += error.faults
        if faults:
            raise DataError(*dict.fromkeys(faults))
        files = {name: excerpt.files for name, excerpt in taken.items()}
        data = config.data.model_copy(update={**files, "cache_dir": str(Path(folder) / "cache")})
        if config.data.valid_fraction is not None:
            taken["valid"] = taken["train"]
        yield Excerpts(config.model_copy(update={"data": data}), taken)


def _take(files: Sequence[str], folder: Path) -> Excerpt:
    for file in files:
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            open_text(file).close()  # which says why it can't be read
    sizes = {file: os.path.getsize(file) for file in files}
    packed = {file: size for file, size in sizes.items() if file.endswith(".gz")}
    plain = {file: size for file, size in sizes.items() if file not in packed}
    if not packed and sum(plain.values()) <= EXCERPT_BYTES:
        return Excerpt(list(files), {}, sum(plain.values()), sum(plain.values()))
    unpacked = _unpack(packed, folder, EXCERPT_BYTES * sum(packed.values()) // sum(sizes.values()))
    pieces = _cut(plain, folder, EXCERPT_BYTES * sum(plain.values()) // sum(sizes.values()))
    places = unpacked.places | pieces.places
    taken, whole = unpacked.taken_bytes + pieces.taken_bytes, unpacked.all_bytes + pieces.all_bytes
    return Excerpt(list(places), places, taken, whole)


def _cut(sizes: dict[str, int], folder: Path, budget: int) -> Excerpt:
    """Pieces of whole lines, evenly spaced over the files; raises DataError where a line is too long."""
    whole = sum(sizes.values())
    count = max(1, budget // PIECE_BYTES)
    begins = [whole * number // count for number in range(count)]
    places: dict[str, str] = {}
    taken = before = 0
    for file, size in sizes.items():
        with open(file, "rb") as handle:
            for begin in (place - before for place in begins if before <= place < before + size):
                if handle.tell() < begin:  # else the piece before reached as far; lines may be long
                    handle.seek(begin - 1)
                    _finish_line(handle, _place(file, begin), 1)
                first = handle.tell()
                text = handle.read(PIECE_BYTES)
                if text := text + _finish_line(handle, _place(file, first), 1 + text.count(b"\n")):
                    piece = _name(folder, len(places), file)
                    piece.write_bytes(text)
                    places[str(piece)] = _place(file, first)
                    taken += len(text)
        before += size
    return Excerpt(list(places), places, taken, whole)


def _finish_line(handle: IO[bytes], place: str, line: int) -> bytes:
    """What is left of a line that a piece would begin or end in."""
    rest = handle.readline(LONGEST_LINE_BYTES + 1)
    if len(rest) > LONGEST_LINE_BYTES:
        raise too_long(place, line)
    return rest


def _place(file: str, first: int) -> str:
    return f"{file} (from byte {first:,} on)" if first else file


def _unpack(sizes: dict[str, int], folder: Path, budget: int) -> Excerpt:
    """The beginnings of packed files, and from these how large all are unpacked."""
    every = max(1, len(sizes) // PACKED_FILES)
    chosen = list(sizes)[::every]
    places: dict[str, str] = {}
    taken = read = unpacked_bytes = 0
    for file in chosen:
        text, taken_of = _beginning(file, max(PIECE_BYTES, budget // len(chosen)))
        read += taken_of
        unpacked_bytes += len(text)
        whole_lines = text if taken_of == sizes[file] else text[: text.rfind(b"\n") + 1]
        taken += len(whole_lines)
        (piece := _name(folder, len(places), file.removesuffix(".gz"), "-unpacked")).write_bytes(whole_lines)
        places[str(piece)] = file
    return Excerpt(list(places), places, taken, round(sum(sizes.values()) * unpacked_bytes / max(1, read)))


def _beginning(file: str, most: int) -> tuple[bytes, int]:
    """About so many bytes of what a file unpacks to, and how many of the file they were unpacked from."""
    text, read, inside = bytearray(), 0, False
    with open(file, "rb") as handle:
        while len(text) < most and (chunk := handle.read(1 << 14)):
            read += len(chunk)
            while chunk:
                if not inside:  # a file may have several parts, one after the other
                    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
                try:
                    text += unpacker.decompress(chunk)
                except zlib.error as error:
                    raise DataError(f"{file}: broken gzip file: {error}") from None
                inside, chunk = not unpacker.eof, unpacker.unused_data.lstrip(b"\0")  # zeros may follow
    if inside and len(text) < most:
        raise DataError(f"{file}: broken gzip file: it ends too early")
    return bytes(text), read


def _name(folder: Path, number: int, file: str, kind: str = "") -> Path:
    """A name for a piece, with the suffix by which its format is known."""
    return folder / f"{number:04d}{kind}{'.jsonl' if file.endswith('.jsonl') else '.txt'}"
