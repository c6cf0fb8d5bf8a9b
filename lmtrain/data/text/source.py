"""Which texts a token store is made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lmtrain.data.text.digests import Digests
from lmtrain.data.text.reading import Block, RawBlock, expand_patterns, parse, raw_blocks, resolve_format
from lmtrain.errors import DataError

STORE_FORMAT = 1  # of the stores
MOST_NAMES = 5
Part = Literal["all", "train", "valid"]


@dataclass(frozen=True)
class Source:
    """Which texts of which files: all of them, or one side of a split by content.

    With `valid_fraction`, a text belongs to the validation part where the hash of its content says so: the split does
    not depend on the order of the lines, and equal lines never stand on both sides.
    """

    files: tuple[str, ...]
    format: str = "auto"
    field: str = "text"
    part: Part = "all"
    valid_fraction: float = 0.0
    stream: bool = False  # one long text: blank lines count, and a newline is an end token

    @classmethod
    def of(cls, patterns: Sequence[str], **settings: object) -> Source:
        """The source that paths and globs name; settings as the fields."""
        return cls(tuple(expand_patterns(patterns)), **settings)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The files, for a message."""
        more = len(self.files) - MOST_NAMES
        return ", ".join(self.files[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")

    def size(self, count: int | None = None) -> int:
        """Bytes of the files, or of the first so many; those that can't be read count nothing."""
        return sum(map(_size, self.files[:count]))

    def raws(self, file: int = 0, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        """The lines of all files in order, a block at a time, from a place on; raises DataError as `raw_blocks`."""
        held, behind = None, self.size(file)
        try:
            for number, path in enumerate(self.files[file:], file):
                for raw in raw_blocks(path, offset, line):
                    if held is not None:
                        yield held
                    held = raw._replace(file=number, read_bytes=behind + raw.read_bytes)
                offset, line, behind = 0, 1, behind + _size(path)
        except DataError:  # a fault that stands before this one is told first
            if held is not None:
                yield held
            raise
        if held is not None:
            yield held._replace(last=True)

    def parse(self, raw: RawBlock) -> Block:
        """The texts of a block; raises DataError as `reading.parse`."""
        return parse(raw, resolve_format(raw.path, self.format), self.field)

    def has_records(self, raw: RawBlock) -> bool:
        """Whether the lines of a block are JSON."""
        return resolve_format(raw.path, self.format) == "jsonl"

    def kept(self, block: Block) -> Block:
        """The block with the texts of the other part as empty texts."""
        if self.part == "all":
            return block
        return block._replace(texts=[text if self._is_ours(text) else "" for text in block.texts])

    def _is_ours(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return held_out == (self.part == "valid")

    def blocks(self) -> Iterator[Block]:
        """The texts, a block at a time, those of the other part as empty texts; raises DataError with the place."""
        return (self.kept(self.parse(raw)) for raw in self.raws())

    def texts(self) -> Iterator[str]:
        """The texts that are not blank, one at a time."""
        for block in self.blocks():
            yield from filter(str.strip, block.texts)

    def key(self, digests: Digests, *more: str) -> str:
        """A name for this content and what was made of it."""
        formats = [resolve_format(path, self.format) for path in self.files]
        facts = [STORE_FORMAT, formats, self.field, self.part, self.valid_fraction, self.stream, *more]
        hashes = digests.sha256_of(self.files)
        return hashlib.sha256(json.dumps([facts, hashes]).encode()).hexdigest()[:32]

    def check_at_rest(self, digests: Digests) -> None:
        """Raises DataError where a file is not what it was when its digest was made."""
        if any(digests.has_changed(path) for path in self.files):
            raise DataError(f"{self.name}: changed while it was read; start again when it is at rest")


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0
