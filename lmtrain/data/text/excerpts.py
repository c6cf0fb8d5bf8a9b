"""Takes excerpts for `lmtrain check` from files that are too large to be read whole: pieces from all over them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from lmtrain.config import Config
from lmtrain.data.text.formats.base import Format, Keys
from lmtrain.data.text.formats.fields import DEFAULT_FIELD
from lmtrain.data.text.formats.table import format_of, resolve_format
from lmtrain.data.text.reading import LONGEST_RECORD_BYTES, expand_patterns, open_text, read_encoding
from lmtrain.data.text.unpacking import packing_of
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
    with scratch_directory() as folder:
        for part in PARTS:
            if (paths := getattr(data, part)) is not None:
                (home := folder / part).mkdir()
                try:
                    taken[part] = _take(_formats_of(expand_patterns(paths), config), home)
                except DataError as error:
                    faults += error.faults
        if faults:
            raise DataError(*dict.fromkeys(faults))
        # what pieces hold is lines of text or records that `_first_records` writes
        files = {part: excerpt.files for part, excerpt in taken.items()}
        ways = {"format": "auto", "field": DEFAULT_FIELD, "separator": "line", "encoding": "utf-8"}
        update = {**files, **ways, "cache_dir": str(folder / "cache")}
        if data.valid_fraction is not None:
            taken["valid"] = taken["train"]
        yield Excerpts(config.model_copy(update={"data": data.model_copy(update=update)}), taken)


def _formats_of(files: list[str], config: Config) -> dict[str, Format]:
    """The format of each file."""
    data, stream = config.data, config.batching.mode == "stream"
    name = "ids" if config.tokenizer.kind == "ids" else data.format
    keys = Keys(name, data.field, data.separator, data.encoding, stream)
    return {file: format_of(file, keys._replace(format=resolve_format(file, name, data.encoding))) for file in files}


def _take(formats: dict[str, Format], folder: Path) -> Excerpt:
    for file in formats:
        if not os.access(file, os.R_OK):
            open_text(file).close()  # this raises the error that says why
    sizes = {file: os.path.getsize(file) for file in formats}
    entered = {file: size for file, size in sizes.items() if _may_begin_inside(file, formats[file])}
    begun = {file: size for file, size in sizes.items() if file not in entered}
    total = sum(sizes.values())
    if not begun and total <= EXCERPT_BYTES:
        return Excerpt(list(sizes), {}, total, total)
    beginnings = _take_beginnings(begun, formats, folder, EXCERPT_BYTES * sum(begun.values()) // max(1, total))
    pieces = _take_pieces(entered, formats, folder, EXCERPT_BYTES * sum(entered.values()) // max(1, total))
    places = beginnings.places | pieces.places
    taken, whole = beginnings.taken_bytes + pieces.taken_bytes, beginnings.all_bytes + pieces.all_bytes
    return Excerpt(list(places), places, taken, whole)


def _may_begin_inside(file: str, form: Format) -> bool:
    """Whether reading may begin at any line of a file: it holds lines of UTF-8, and is not packed."""
    with open_text(file) as handle:
        is_plain = packing_of(file, handle) is None and read_encoding(file, handle, form.keys.encoding) == "utf-8"
    return form.lines_are_records and is_plain


def _take_pieces(sizes: dict[str, int], formats: dict[str, Format], folder: Path, budget: int) -> Excerpt:
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
                    _finish_line(handle, formats[file], _place(file, begin), 1)
                first = handle.tell()
                text = handle.read(PIECE_BYTES)
                if text := text + _finish_line(handle, formats[file], _place(file, first), 1 + text.count(b"\n")):
                    piece = folder / f"{len(places):04d}{_suffix(formats[file])}"
                    piece.write_bytes(text)
                    places[str(piece)] = _place(file, first)
                    taken += len(text)
        before += size
    return Excerpt(list(places), places, taken, whole)


def _suffix(form: Format) -> str:
    """The suffix of a piece: lines of text or ids, or JSON lines."""
    is_text = form.keys.format == "ids" or (form.lines_are_records and form.keys.format != "jsonl")
    return ".txt" if is_text else ".jsonl"


def _finish_line(handle: IO[bytes], form: Format, place: str, line: int) -> bytes:
    """Read the rest of the line in which a piece would begin or end; of a stream's long line up to a space."""
    begin, may_be_cut = handle.tell(), form.may_be_cut and form.keys.stream
    rest = handle.readline(PIECE_BYTES if may_be_cut else LONGEST_RECORD_BYTES + 1)
    if may_be_cut and not rest.endswith(b"\n"):
        rest = rest[: rest.rfind(b" ") + 1] or rest.decode(errors="ignore").encode()
        handle.seek(begin + len(rest))
    elif len(rest) > LONGEST_RECORD_BYTES:
        raise form.too_long(place, line)
    return rest


def _place(file: str, first: int) -> str:
    return f"{file} (from byte {first:,} on)" if first else file


def _take_beginnings(sizes: dict[str, int], formats: dict[str, Format], folder: Path, budget: int) -> Excerpt:
    """Take the beginnings of some files, and estimate from these how many bytes of text all have."""
    chosen = list(sizes)[:: max(1, len(sizes) // BEGUN_FILES)]
    places: dict[str, str] = {}
    taken = read = 0
    for file in chosen:
        text, read_bytes = _first_records(file, formats[file], max(PIECE_BYTES, budget // len(chosen)))
        read += read_bytes
        taken += len(text)
        piece = folder / f"{len(places):04d}-begun{_suffix(formats[file])}"
        piece.write_bytes(text)
        places[str(piece)] = file
    return Excerpt(list(places), places, taken, round(sum(sizes.values()) * taken / max(1, read)))


def _first_records(file: str, form: Format, most: int) -> tuple[bytes, int]:
    """Return about `most` bytes of records, and the number of bytes of the file they were read from.

    Lines are returned as they are, and other records as JSON lines.
    """
    text, read_bytes = bytearray(), 0
    for raw in form.raw_blocks(file):
        if form.lines_are_records:
            text += raw.data + b"\n"
        else:
            for passage in form.parse(raw).texts:
                is_ids = form.keys.format == "ids"
                text += b" ".join(passage.encode().split()) if is_ids else json.dumps({"text": passage}).encode()
                text += b"\n"
        read_bytes = raw.read_bytes
        if len(text) >= most:
            break
    return bytes(text), read_bytes
