"""The texts that a token store holds: the files, their format, and the part of their texts that is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lmtrain.data.text.digests import Digests
from lmtrain.data.text.formats.table import format_of, resolve_format
from lmtrain.data.text.reading import Block, RawBlock, expand_patterns
from lmtrain.errors import DataError

STORE_FORMAT = 1  # version of the token stores
MOST_NAMES = 5
Part = Literal["all", "train", "valid"]


@dataclass(frozen=True)
class Source:
    """Files and which of their texts are read: all, or one side of a split by content.

    With `valid_fraction`, the hash of a text's content decides whether the text belongs to the validation part. So the
    split does not depend on the order of the texts, and equal texts are never on both sides.
    """

    files: tuple[str, ...]
    format: str = "auto"
    field: str = "text"
    part: Part = "all"
    valid_fraction: float = 0.0
    stream: bool = False  # one long text: blank lines count, and each newline is an end token

    @classmethod
    def of(cls, patterns: Sequence[str], **settings: object) -> Source:
        """Return the source of the files that paths and globs name, or raise DataError; `settings`: other fields."""
        return cls(tuple(expand_patterns(patterns)), **settings)  # type: ignore[arg-type]

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
        try:
            for number, path in enumerate(self.files[file:], file):
                for raw in format_of(path, self.format, self.field).raw_blocks(path, offset, line):
                    if held is not None:
                        yield held
                    held = raw._replace(file=number, read_bytes=bytes_before + raw.read_bytes)
                offset, line, bytes_before = 0, 1, bytes_before + _size(path)
        except DataError:  # the block before may have a fault of its own, which is to be reported first
            if held is not None:
                yield held
            raise
        if held is not None:
            yield held._replace(last=True)

    def parse(self, raw: RawBlock) -> Block:
        """Return the texts of a block; raises DataError with the place."""
        return format_of(raw.path, self.format, self.field).parse(raw)

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        """Return strings with the words of a block, as `Format.unsplit_texts`; raises DataError with the place."""
        return format_of(raw.path, self.format, self.field).unsplit_texts(raw)

    def kept(self, block: Block) -> Block:
        """Return the block with an empty text in place of each text of the other part."""
        if self.part == "all":
            return block
        return block._replace(texts=[text if self._is_in_part(text) else "" for text in block.texts])

    def _is_in_part(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return held_out == (self.part == "valid")

    def blocks(self) -> Iterator[Block]:
        """Read the texts a block at a time, as `kept` returns them; raises DataError with the place."""
        return (self.kept(self.parse(raw)) for raw in self.raws())

    def texts(self) -> Iterator[str]:
        """Read the texts that are not blank, one at a time."""
        for block in self.blocks():
            yield from filter(str.strip, block.texts)

    def key(self, digests: Digests, *more: str) -> str:
        """Return a name for what is made from the texts: it changes with their content, the settings and `more`."""
        formats = [resolve_format(path, self.format) for path in self.files]
        facts = [STORE_FORMAT, formats, self.field, self.part, self.valid_fraction, self.stream, *more]
        hashes = digests.sha256_of(self.files)
        return hashlib.sha256(json.dumps([facts, hashes]).encode()).hexdigest()[:32]

    def check_at_rest(self, digests: Digests) -> None:
        """Raise DataError if a file has changed since `digests` computed its digest."""
        if any(digests.has_changed(path) for path in self.files):
            raise DataError(f"{self.name}: changed while it was read; start again when it is at rest")


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0
