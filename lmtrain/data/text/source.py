"""The texts that a token store holds: the files, their format, and the part of their texts that is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmtrain.data.text.digests import Digests
from lmtrain.data.text.formats.base import Format, Keys
from lmtrain.data.text.formats.fields import DEFAULT_FIELD
from lmtrain.data.text.formats.table import detect_format, format_of, resolve_format
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block, RawBlock, expand_patterns, open_text, read_encoding
from lmtrain.errors import DataError

STORE_FORMAT = 2  # version of the token stores
MOST_NAMES = 5
Part = Literal["all", "train", "valid"]


class Understanding(NamedTuple):
    """How a file is read, for people."""

    file: str
    format: str
    why: str  # why this format: by its suffix, by its content, data.format
    encoding: str
    details: str  # what ends a sequence; of a record or table which field is read

    def __str__(self) -> str:
        return f"{self.file}: {self.format} ({self.why}), {self.encoding}, {self.details}"


@dataclass(frozen=True)
class Source:
    """Files and which of their texts are read: all, or one side of a split by content.

    With `valid_fraction`, the hash of a text's content decides whether the text belongs to the validation part. So the
    split does not depend on the order of the texts, and equal texts are never on both sides.
    """

    files: tuple[str, ...]
    format: str = "auto"
    field: str = DEFAULT_FIELD
    separator: str = "line"
    encoding: str = "utf-8"
    empty: Literal["skip", "keep"] = "skip"
    part: Part = "all"
    valid_fraction: float = 0.0
    stream: bool = False  # one long text: blank lines count, and each newline is an end token
    may_be_one: bool = False  # whether the files may be one text, in which a separator of one's own never occurs

    @classmethod
    def of(cls, patterns: Sequence[str], **settings: object) -> Source:
        """Return the source of the files that paths and globs name, or raise DataError; `settings`: other fields."""
        return cls(tuple(expand_patterns(patterns)), **settings)  # type: ignore[arg-type]

    @property
    def keeps_blank(self) -> bool:
        """Whether a text that is empty or white space is a sequence."""
        return self.stream or self.empty == "keep"

    @property
    def name(self) -> str:
        """The files, for a message."""
        more = len(self.files) - MOST_NAMES
        return ", ".join(self.files[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")

    def size(self, count: int | None = None) -> int:
        """Return the bytes of the files, or of the first `count` of them; files that can't be read count nothing."""
        return sum(map(_size, self.files[:count]))

    def raws(self, file: int = 0, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """Read all files in order, a block at a time; raises DataError as `Format.raw_blocks`.

        Args:
            file, offset, line: where to begin: `file`, `end` and `next_line` of an earlier block.
        """
        held, bytes_before = None, self.size(file)  # a block is held back until it is known whether it is the last one
        # else a separator of one's own that never occurs is a mistake
        is_separated = self.may_be_one or self.separator in ("line", "paragraph", "file") or (file, offset) > (0, 0)
        separator = normalise(self.separator)
        try:
            for number, path in enumerate(self.files[file:], file):
                name = resolve_format(path, self.format, self.encoding)
                for raw in self._format(path, name).raw_blocks(path, offset, line):
                    if held is not None:
                        yield held
                    is_separated = is_separated or separator in normalise(raw.data.decode("utf-8", "replace"))
                    held = raw._replace(file=number, format=name, read_bytes=bytes_before + raw.read_bytes)
                offset, line, bytes_before = 0, 1, bytes_before + _size(path)
            if held is not None and not is_separated:
                raise DataError(f"{self.name}: the separator {self.separator!r} never occurs (data.separator)")
        except DataError:  # the block before may have a fault of its own, which is to be reported first
            if held is not None:
                yield held
            raise
        if held is not None:
            yield held._replace(last=True)

    def _format(self, path: str, name: str) -> Format:
        return format_of(path, Keys(name, self.field, self.separator, self.encoding, self.stream))

    def understood(self, path: str) -> Understanding:
        """Return how one of the files is read; raises DataError if it can't be."""
        if self.format == "auto":
            name, why = detect_format(path, self.encoding)
        else:
            name, why = self.format, "data.format"
        form = self._format(path, name)
        with open_text(path) as handle:
            encoding = "binary" if name == "parquet" else read_encoding(path, handle, self.encoding)
        return Understanding(path, name, why, encoding, form.details(form.header(path)))

    def notes(self) -> Iterator[str]:
        """Yield a line on how a file is read where that was found out and not configured; raises DataError."""
        read = self.understood(self.files[0])
        # where a field has the configured name, it is the one that is read
        is_chosen = read.format in ("jsonl", "json", "parquet") and repr(self.field) not in read.details
        if is_chosen or read.format in ("csv", "tsv"):
            yield f"note: {read.file} is read as {read.format}: {read.details}"

    def parse(self, raw: RawBlock) -> Block:
        """Return the texts of a block; raises DataError with the place."""
        return self._format(raw.path, raw.format).parse(raw)

    def has_lines(self, raw: RawBlock) -> bool:
        """Return whether the texts of a block are its lines, so that none has a line break within."""
        return raw.format == "text" and self.separator == "line"

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        """Return strings with the words of a block, as `Format.unsplit_texts`; raises DataError with the place."""
        return self._format(raw.path, raw.format).unsplit_texts(raw)

    def sequences(self, block: Block) -> Block:
        """Return the block with those of its texts that are sequences of this source.

        Left out are the texts of the other part, and blank ones, unless `empty` keeps them or this is a stream.
        """
        if self.part == "all" and (self.keeps_blank or all(map(str.strip, block.texts))):
            return block
        kept = [
            (line, text)
            for line, text in zip(block.lines, block.texts, strict=True)
            if (self.keeps_blank or text.strip()) and self._is_in_part(text)
        ]
        return block._replace(lines=[line for line, _ in kept], texts=[text for _, text in kept])

    def _is_in_part(self, text: str) -> bool:
        if self.part == "all":
            return True
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return held_out == (self.part == "valid")

    def blocks(self) -> Iterator[Block]:
        """Read the sequences a block at a time, as `sequences` returns them; raises DataError with the place."""
        return (self.sequences(self.parse(raw)) for raw in self.raws())

    def texts(self) -> Iterator[str]:
        """Read the sequences, one at a time; a stream's lines, but blank ones."""
        for block in self.blocks():
            yield from block.texts

    def key(self, digests: Digests, *more: str) -> str:
        """Return a name for what is made from the texts: it changes with their content, the settings and `more`."""
        formats = [resolve_format(path, self.format, self.encoding) for path in self.files]
        ways = [self.field, self.separator, self.encoding, self.empty]
        facts = [STORE_FORMAT, formats, *ways, self.part, self.valid_fraction, self.stream, *more]
        hashes = digests.sha256_of(self.files)
        return hashlib.sha256(json.dumps([facts, hashes]).encode()).hexdigest()[:32]

    def check_at_rest(self, digests: Digests) -> None:
        """Raise DataError if a file has changed since `digests` computed its digest."""
        if any(digests.has_changed(path) for path in self.files):
            raise DataError(f"{self.name}: changed while it was read; start again when it is at rest")


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0
