"""Takes excerpts for `lmtrain check` from files that are too large to be read whole: pieces from all over them."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from lmtrain.config import Config
from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.table import FORMATS, format_of
from lmtrain.data.text.reading import LONGEST_LINE_BYTES, expand_patterns, open_text, too_long
from lmtrain.errors import DataError
from lmtrain.system.files import scratch_directory

PARTS = ("train", "valid", "test")
EXCERPT_BYTES = 8 << 20  # taken from all files of a corpus together
PIECE_BYTES = 128 << 10  # taken at one place
BEGUN_FILES = 16  # about this number of files are read, if files can be read from their beginning only


class Excerpt(NamedTuple):
    """An excerpt of a corpus; a small corpus is taken as a whole."""

    files: list[str]
    places: dict[str, str]  # for each file of the excerpt, where in the corpus it was taken from, for messages
    taken_bytes: int
    all_bytes: int  # size of the corpus; the unpacked size of packed files is estimated

    @property
    def scale(self) -> float:
        """How many times larger the corpus is than the excerpt."""
        return self.all_bytes / max(1, self.taken_bytes)


class Excerpts(NamedTuple):
    """A configuration that reads excerpts in place of its corpora, with a cache of its own."""

    config: Config
    of: dict[str, Excerpt]  # the excerpts by train, valid, test

    def named(self, fault: str) -> str:
        """Return a fault with the name of the user's own file in place of an excerpt's."""
        for excerpt in self.of.values():
            for file, place in excerpt.places.items():
                fault = fault.replace(file, place)
        return fault


def size_of(config: Config) -> int:
    """Return the bytes of all data files, as they are on disk; raises DataError if a path or glob names nothing."""
    files = {file for part in PARTS for file in expand_patterns(getattr(config.data, part) or ())}
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


@contextmanager
def excerpts_of(config: Config) -> Iterator[Excerpts]:
    """Take excerpts into a directory that is removed afterwards; raises DataError if files can't be read."""
    data, taken, faults = config.data, dict[str, Excerpt](), list[str]()
    name = "ids" if config.tokenizer.kind == "ids" else data.format
    with scratch_directory() as folder:
        for part in PARTS:
            if (paths := getattr(data, part)) is not None:
                (home := folder / part).mkdir()
                try:
                    formats = {file: format_of(file, name, data.field) for file in expand_patterns(paths)}
                    taken[part] = _take(formats, home)
                except DataError as error:
                    faults += error.faults
        if faults:
            raise DataError(*dict.fromkeys(faults))
        update = {part: excerpt.files for part, excerpt in taken.items()} | {"cache_dir": str(folder / "cache")}
        if name != "auto" and not FORMATS[name].lines_are_records:
            update["format"] = "jsonl"  # which `_first_records` writes
        if data.valid_fraction is not None:
            taken["valid"] = taken["train"]
        yield Excerpts(config.model_copy(update={"data": data.model_copy(update=update)}), taken)


def _take(formats: dict[str, Format], folder: Path) -> Excerpt:
    for file in formats:
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            open_text(file).close()  # this raises the error that says why
    sizes = {file: os.path.getsize(file) for file in formats}
    # files that can be read from their beginning only, and files that can be read from the middle
    begun = {file: sizes[file] for file in sizes if file.endswith(".gz") or not formats[file].lines_are_records}
    entered = {file: size for file, size in sizes.items() if file not in begun}
    total = sum(sizes.values())
    if not begun and total <= EXCERPT_BYTES:
        return Excerpt(list(sizes), {}, total, total)
    beginnings = _take_beginnings(begun, formats, folder, EXCERPT_BYTES * sum(begun.values()) // max(1, total))
    pieces = _take_pieces(entered, folder, EXCERPT_BYTES * sum(entered.values()) // max(1, total))
    places = beginnings.places | pieces.places
    taken, whole = beginnings.taken_bytes + pieces.taken_bytes, beginnings.all_bytes + pieces.all_bytes
    return Excerpt(list(places), places, taken, whole)


def _take_pieces(sizes: dict[str, int], folder: Path, budget: int) -> Excerpt:
    """Take pieces of whole lines, evenly spaced over the files; raises DataError if a line is too long."""
    whole = sum(sizes.values())
    count = max(1, budget // PIECE_BYTES)
    begins = [whole * number // count for number in range(count)]
    places: dict[str, str] = {}
    taken = before = 0
    for file, size in sizes.items():
        with open(file, "rb") as handle:
            for begin in (place - before for place in begins if before <= place < before + size):
                if handle.tell() < begin:  # else long lines made the piece before reach as far as this
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
    """Read the rest of the line in which a piece would begin or end."""
    rest = handle.readline(LONGEST_LINE_BYTES + 1)
    if len(rest) > LONGEST_LINE_BYTES:
        raise too_long(place, line)
    return rest


def _place(file: str, first: int) -> str:
    return f"{file} (from byte {first:,} on)" if first else file


def _take_beginnings(sizes: dict[str, int], formats: dict[str, Format], folder: Path, budget: int) -> Excerpt:
    """Take the beginnings of some files, and estimate from these how many bytes of text all have."""
    chosen = list(sizes)[:: max(1, len(sizes) // BEGUN_FILES)]
    places: dict[str, str] = {}
    taken = read = text_bytes = 0
    for file in chosen:
        by_line, most = formats[file].lines_are_records, max(PIECE_BYTES, budget // len(chosen))
        text, read_bytes = _unpack(file, most) if by_line else _first_records(file, formats[file], most)
        read += read_bytes
        text_bytes += len(text)
        whole_lines = text if read_bytes == sizes[file] else text[: text.rfind(b"\n") + 1]
        taken += len(whole_lines)
        piece = _name(folder, len(places), file.removesuffix(".gz") if by_line else ".jsonl", "-begun")
        piece.write_bytes(whole_lines)
        places[str(piece)] = file
    return Excerpt(list(places), places, taken, round(sum(sizes.values()) * text_bytes / max(1, read)))


def _first_records(file: str, form: Format, most: int) -> tuple[bytes, int]:
    """Return about `most` bytes of texts as JSON lines, and the number of bytes of the file they were read from."""
    text, read_bytes = bytearray(), 0
    for raw in form.raw_blocks(file):
        for line in form.parse(raw).texts:
            text += json.dumps({form.field: line}).encode() + b"\n"
        read_bytes = raw.read_bytes
        if len(text) >= most:
            break
    return bytes(text), read_bytes


def _unpack(file: str, most: int) -> tuple[bytes, int]:
    """Return about `most` bytes of an unpacked file, and the number of bytes they were unpacked from."""
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
    """Return a name for a piece, with the suffix by which its format is known."""
    return folder / f"{number:04d}{kind}{'.jsonl' if file.endswith('.jsonl') else '.txt'}"
