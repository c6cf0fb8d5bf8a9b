"""The token store: a corpus as flat ids on disk, read through memory maps.

A store is a directory: `tokens.bin` (uint16 or uint32, little-endian), every sequence from its `<bos>` to its
`<eos>`, or of a stream every line to its `<eos>`; `offsets.bin` (uint64), where each begins and the last one ends;
`hashes.bin` (uint64), one a sequence; `store.json`, the counts. It is written in one pass and bounded memory, renamed
into place when whole, and named after the content of the files and the tokenizer, so that a changed file is never
served stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.paging import release
from lmtrain.data.reading import Block, content_hash, expand, read_texts, resolve_format
from lmtrain.data.tokenizer import Ids, Tokenizer
from lmtrain.errors import ArtefactError, DataError, StorageError
from lmtrain.files import read_sealed, reason, sealed, sync_directory

FORMAT = 1
ARRAYS = ("tokens", "offsets", "hashes")
COMPARED = 1 << 20  # hashes at once
Part = Literal["all", "train", "valid"]


@dataclass(frozen=True)
class Source:
    """Which texts of which files: all of them, or one side of a split by content.

    With `valid_fraction`, a text belongs to the validation part where the hash of its content says so: the split does
    not depend on the order of the lines, and equal lines never stand on both sides.
    """

    files: tuple[str, ...]
    format: str = "auto"
    jsonl_field: str = "text"
    part: Part = "all"
    valid_fraction: float = 0.0
    stream: bool = False  # one long text: blank lines count, and a newline is an end token

    @classmethod
    def of(cls, patterns: Sequence[str], **settings: object) -> Source:
        """The source that paths and globs name; settings as the fields."""
        return cls(tuple(expand(patterns)), **settings)  # type: ignore[arg-type]

    def blocks(self) -> Iterator[Block]:
        """The texts, a block at a time, those of the other part as empty texts."""
        for block in read_texts(self.files, self.format, self.jsonl_field):
            yield block if self.part == "all" else block._replace(texts=list(map(self._kept, block.texts)))

    def _kept(self, text: str) -> str:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < self.valid_fraction * 2**64
        return text if held_out == (self.part == "valid") else ""

    def texts(self) -> Iterator[str]:
        """The texts that are not blank, one at a time."""
        for block in self.blocks():
            yield from (text for text in block.texts if text.strip())

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {path: content_hash(path) for path in self.files}

    def key(self, *more: str) -> str:
        """A name for this content and what was made of it."""
        formats = [resolve_format(path, self.format) for path in self.files]
        facts = [FORMAT, formats, self.jsonl_field, self.part, self.valid_fraction, self.stream, *more]
        return hashlib.sha256(json.dumps([facts, list(self.hashes().values())]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoreCounts:
    """What a store holds."""

    sequences: int = 0  # of a stream: lines
    tokens: int = 0  # with `<bos>` and `<eos>`; of a stream with `<eos>`
    unknown_tokens: int = 0
    characters: int = 0  # each `<eos>` counted as one
    bytes: int = 0  # of UTF-8, likewise
    blank: int = 0
    longest: int = 0  # tokens, `<bos>` and `<eos>` not counted
    stream: bool = False
    dtype: str = "uint16"
    checksums: tuple[int, ...] = ()  # CRC-32 of tokens, offsets, hashes

    @property
    def events(self) -> int:
        """Tokens that a direction predicts: `<bos>` is not."""
        return self.tokens if self.stream else self.tokens - self.sequences


UNREADABLE = (OSError, ValueError, TypeError, KeyError, ArtefactError)  # what a store that is not whole raises


class TokenStore:
    """A whole store, memory-mapped. `tokens` (T,), `offsets` (sequences + 1,), `hashes` (sequences,).

    Raises:
        OSError, ValueError, TypeError, KeyError, ArtefactError: not there, or not as it was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.counts = StoreCounts(**read_sealed(directory / "store.json"))
        self.tokens: NDArray[np.unsignedinteger] = self._map("tokens", self.counts.dtype, self.counts.tokens)
        self.offsets: NDArray[np.uint64] = self._map("offsets", "uint64", self.counts.sequences + 1)
        self.hashes: NDArray[np.uint64] = self._map("hashes", "uint64", self.counts.sequences)
        found = [_checksum(directory / f"{name}.bin") for name in ARRAYS]
        if found != list(self.counts.checksums):
            raise ValueError("not the bytes that were written")

    def _map(self, name: str, dtype: str, size: int) -> NDArray[np.unsignedinteger]:
        return np.memmap(self.directory / f"{name}.bin", np.dtype(dtype).newbyteorder("<"), "r", shape=(size,))

    def longer_than(self, max_length: int) -> int:
        """How many sequences have more tokens than that, `<bos>` and `<eos>` not counted."""
        if self.counts.longest <= max_length:
            return 0
        return int((np.diff(self.offsets) > max_length + 2).sum())

    def overlap(self, other: TokenStore) -> int:
        """How many of this store's sequences also stand in the other, which may be large, token for token."""
        own, counts = np.unique(self.hashes, return_counts=True)
        shift, found = np.uint64(40), np.zeros(len(own), bool)
        begins = np.zeros(1 << 24, bool)  # of a hash: which there are; it leaves few to be looked up
        begins[own >> shift] = True
        for first in range(0, len(other.hashes), COMPARED):
            hashes = other.hashes[first : first + COMPARED]
            found |= np.isin(own, hashes[begins[hashes >> shift]])
            release(other.hashes)
        return int(counts[found].sum())


def open_store(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    announce: Callable[[str], None] = lambda line: None,
) -> TokenStore:
    """The store of a source under `cache_dir`, built first where it is not there yet.

    Raises:
        DataError: a fault of the text, with its place; or no text at all.
    """
    cache = Path(cache_dir)
    home = cache / source.key(tokenizer.fingerprint())
    with suppress(*UNREADABLE):  # then it is built again
        return TokenStore(home)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{cache}: can't be made: {reason(error)}; set data.cache_dir") from None
    _remove_abandoned(cache)
    announce(f"reading {', '.join(source.files)}")
    with _building(cache, home) as directory:
        counts = _write(source, tokenizer, directory)
        if not counts.sequences:
            empty = f"no text: nothing but {counts.blank} blank lines"
            if source.part != "all":
                empty = f"data.valid_fraction {source.valid_fraction:g} leaves the {source.part} part without a text"
            raise DataError(f"{', '.join(source.files)}: {empty}")
        if source.key(tokenizer.fingerprint()) != home.name:
            raise DataError(f"{', '.join(source.files)}: changed while it was read; start again when it is at rest")
    try:
        return TokenStore(home)
    except UNREADABLE:
        raise StorageError(f"{home}: holds other bytes than were written; is there room, is the disk sound?") from None


@contextmanager
def _building(cache: Path, home: Path) -> Iterator[Path]:
    """A directory to build in, renamed to `home` at the end; of two builders the first to end wins.

    Raises:
        StorageError: it can't be written.
    """
    lock = directory = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".building-", suffix=".lock", dir=cache)  # before what it guards
        lock = Path(name)
        with open(descriptor, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            directory = lock.with_suffix("")
            directory.mkdir()
            yield directory
            _put(directory, home)
    except OSError as error:
        raise StorageError(f"{cache}: the token store can't be written: {reason(error)}") from None
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            lock.unlink(missing_ok=True)


def _put(directory: Path, home: Path) -> None:
    """A store that is whole into its place, unless one is there."""
    with open(home.parent / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # nobody replaces a store that somebody else has just put there
        try:
            directory.rename(home)
        except OSError:
            try:
                TokenStore(home)
            except UNREADABLE:  # what stands there is broken
                shutil.rmtree(home)
                directory.rename(home)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed builders left: the directories whose lock nobody holds."""
    for lock in cache.glob(".building-*.lock"):
        with suppress(OSError), open(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read and not mapped: mapped pages would count as this process's memory."""
    checksum = 0
    with open(path, "rb") as handle:
        while part := handle.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _write(source: Source, tokenizer: Tokenizer, directory: Path) -> StoreCounts:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    totals = dict.fromkeys(("sequences", "tokens", "unknown_tokens", "characters", "bytes", "blank", "longest"), 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / f"{name}.bin", "wb")) for name in ARRAYS}
        checksums = dict.fromkeys(ARRAYS, 0)

        def put(name: str, values: NDArray[Any], kind: str) -> None:
            # not by tofile, which buffers on its own and says nothing where that can't be written
            data = values.astype(np.dtype(kind).newbyteorder("<")).data.cast("B")
            files[name].write(data)
            checksums[name] = zlib.crc32(data, checksums[name])  # of what should be there, not of what is

        put("offsets", np.zeros(1), "u8")
        for block, following in pairwise(chain(source.blocks(), [None])):
            assert block is not None
            texts = block.texts if source.stream else [text for text in block.texts if text.strip()]
            totals["blank"] += 0 if source.stream else block.blank
            if not texts:
                continue
            flat, lengths = encode_block(tokenizer, block, texts)
            start = None if source.stream else tokenizer.bos_id
            framed, ends = frame(flat, lengths, tokenizer.eos_id, start)
            newlines = len(texts)
            if source.stream and following is None and not block.ended:  # no newline, no end token
                framed, newlines = framed[:-1], newlines - 1
                ends = ends[: len(ends) - (lengths[-1] == 0)]
                ends[-1:] = len(framed)
                if not len(ends):
                    continue
            put("tokens", framed, dtype)
            put("offsets", ends + totals["tokens"], "u8")
            put("hashes", _hash(framed, ends), "u8")
            totals["sequences"] += len(ends)
            totals["tokens"] += len(framed)
            totals["unknown_tokens"] += 0 if tokenizer.unk_id is None else int((flat == tokenizer.unk_id).sum())
            totals["characters"] += sum(map(len, texts)) + newlines
            totals["bytes"] += len("".join(texts).encode()) + newlines
            totals["longest"] = max(totals["longest"], int(lengths.max()))
        for handle in files.values():
            handle.flush()
            os.fsync(handle.fileno())
    counts = StoreCounts(**totals, stream=source.stream, dtype=dtype, checksums=tuple(checksums.values()))
    (directory / "store.json").write_bytes(sealed(asdict(counts)))
    sync_directory(directory)
    return counts


def encode_block(tokenizer: Tokenizer, block: Block, texts: Sequence[str]) -> tuple[Ids, Ids]:
    """The flat ids and lengths of these texts of a block; raises DataError with the place."""
    try:
        return tokenizer.encode_texts(texts)
    except DataError:
        for number, text in enumerate(block.texts, block.first_line):  # once more, for the place
            column = 0
            for word in text.split():
                column = text.index(word, column)
                try:
                    tokenizer.encode(word)
                except DataError as error:
                    raise DataError(f"{block.path}:{number}:{column + 1}: {error}") from None
                column += len(word)
        raise


def frame(flat: Ids, lengths: Ids, end: int, start: int | None) -> tuple[Ids, Ids]:
    """Put a start token before (None: nothing) and an end token behind each sequence; also where each one ends."""
    more = 1 if start is None else 2
    ends = (lengths + more).cumsum()
    framed = np.empty(int(ends[-1]), np.int64)
    inner = np.ones(len(framed), bool)
    starts = ends - lengths - more
    framed[ends - 1], inner[ends - 1] = end, False
    if start is not None:
        framed[starts], inner[starts] = start, False
    framed[inner] = flat
    return framed, ends


def _hash(framed: Ids, ends: Ids) -> NDArray[np.uint64]:
    """A 64-bit hash of each sequence: its (place, id) pairs, mixed by splitmix64's last steps and summed."""
    starts = np.concatenate([[0], ends[:-1]])
    place = np.arange(len(framed)) - np.repeat(starts, ends - starts)
    mixed = framed.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + place.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.add.reduceat(mixed, starts)
