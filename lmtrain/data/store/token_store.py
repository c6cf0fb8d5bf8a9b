"""The token store: a corpus as flat ids on disk, read through memory maps.

A store is a directory. `tokens.bin` (T,), uint16 or uint32, little-endian, holds every sequence from its `<bos>` to
its `<eos>`, or every line of a stream up to its `<eos>`. `offsets.bin` (S + 1,), uint64, says where each sequence
begins and the last one ends. `hashes.bin` (S,), uint64, holds a hash of each. `store.json` holds the counts. A store is
written in one pass and bounded memory, by several processes if the text is long, and renamed into place when it is
whole. Its name is made from the content of the files and the tokenizer, so a changed file gets a new store.

Shapes: T tokens and S sequences of the store.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.build import ARRAYS, Build, locked, remove_abandoned
from lmtrain.data.store.encoding import BlockEncoder, token_type
from lmtrain.data.store.paging import release_pages
from lmtrain.data.text.digests import AT_REST_NS, LARGE_BYTES, Digests, Watch, unwatched
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError, DataError, StorageError
from lmtrain.system.console import Notify
from lmtrain.system.files import move, read_sealed, reason_of
from lmtrain.system.workers import open_workers

COMPARED = 1 << 20  # sequences that are compared at once
DIGESTS = "digests"  # in the cache directory


@dataclass(frozen=True)
class StoreCounts:
    """What a store holds."""

    sequences: int = 0  # a stream has lines instead
    tokens: int = 0  # `<bos>` and `<eos>` are counted; a stream has no `<bos>`
    unknown_tokens: int = 0
    characters: int = 0  # each `<eos>` counts as one
    bytes: int = 0  # bytes of UTF-8; each `<eos>` counts as one
    blank: int = 0  # lines without a text
    longest: int = 0  # tokens of the longest sequence, or part of a stream's line; `<bos>`, `<eos>` are not counted
    stream: bool = False
    dtype: str = "uint16"
    checksums: tuple[int, ...] = ()  # CRC-32 of tokens, offsets, hashes

    @property
    def events(self) -> int:
        """The tokens that one direction predicts: all but `<bos>`."""
        return self.tokens if self.stream else self.tokens - self.sequences

    def summary(self, show: Callable[[int], str] = "{:,}".format) -> str:
        """Describe the store in a line for people; `show` writes the counts."""
        line = f"{show(self.sequences)} {'lines' if self.stream else 'sequences'}"
        line += f", {show(self.events)} tokens with end tokens"
        line += "" if self.stream else f", longest {self.longest:,}"
        line += f", {self.unknown_tokens / self.events:.2%} unknown"
        return line + (f", {show(self.blank)} blank lines skipped" if self.blank else "")


UNREADABLE = (OSError, ValueError, TypeError, KeyError, ArtefactError)  # a store that is not whole raises one of these


class TokenStore:
    """A whole store, memory-mapped: `tokens` (T,), `offsets` (S + 1,), `hashes` (S,).

    Args:
        digests: remembers the checksums of large stores.

    Raises:
        OSError, ValueError, TypeError, KeyError, ArtefactError: the store does not exist, or is not as it was written.
    """

    def __init__(self, directory: Path, digests: Digests | None = None) -> None:
        self.directory = directory
        self.is_new = self.was_continued = False  # whether it was built just now, and from an unfinished build
        self.counts = StoreCounts(**read_sealed(directory / "store.json"))
        self.tokens: NDArray[np.unsignedinteger] = self._map("tokens", self.counts.dtype, self.counts.tokens)
        self.offsets: NDArray[np.uint64] = self._map("offsets", "uint64", self.counts.sequences + 1)
        self.hashes: NDArray[np.uint64] = self._map("hashes", "uint64", self.counts.sequences)
        digests = digests or Digests(None)
        checksums = [digests.crc32(directory / f"{name}.bin") for name in ARRAYS]
        if checksums != list(self.counts.checksums):
            raise ValueError("not the bytes that were written")

    def _map(self, name: str, dtype: str, size: int) -> NDArray[np.unsignedinteger]:
        return np.memmap(self.directory / f"{name}.bin", np.dtype(dtype).newbyteorder("<"), "r", shape=(size,))

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays on the disk."""
        return int(self.tokens.nbytes + self.offsets.nbytes + self.hashes.nbytes)

    def longer_than(self, max_length: int) -> int:
        """Return the number of sequences of more than `max_length` tokens, `<bos>` and `<eos>` not counted."""
        if self.counts.longest <= max_length:
            return 0
        parts = (self.offsets[k : k + COMPARED + 1] for k in range(0, self.counts.sequences, COMPARED))
        return sum(int((np.diff(part) > max_length + 2).sum()) for part in parts)

    def overlap(self, other: TokenStore) -> int:
        """Return how many of this store's sequences the other store, which may be large, holds token for token."""
        own_hashes, counts = np.unique(self.hashes, return_counts=True)
        shift, shared = np.uint64(40), np.zeros(len(own_hashes), bool)
        begins = np.zeros(1 << 24, bool)  # by the first 24 bits of own hashes, with which few other hashes begin
        begins[own_hashes >> shift] = True
        for first in range(0, len(other.hashes), COMPARED):
            hashes = other.hashes[first : first + COMPARED]
            shared |= np.isin(own_hashes, hashes[begins[hashes >> shift]])
            release_pages(other.hashes)
        return int(counts[shared].sum())


def open_store(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    notify: Notify = lambda line: None,
    watch: Watch = unwatched,
    digests: Digests | None = None,
) -> TokenStore:
    """Return the store of a source under `cache_dir`, and build it first if it does not exist yet.

    Raises:
        DataError: the text has a fault, which is named with its place, or there is no text at all.
        StorageError: the store can't be written.
        OutOfMemoryError: a process that reads text ran out of memory.
    """
    cache = Path(cache_dir)
    digests = digests or Digests(cache / DIGESTS, watch)
    home = cache / source.key(digests, tokenizer.fingerprint())
    with suppress(*UNREADABLE):  # it is built again
        return TokenStore(home, digests)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{cache}: can't be made: {reason_of(error)}; set data.cache_dir") from None
    try:
        remove_abandoned(cache, but=home.name)
        with locked(cache, home.name, notify) as directory:
            with suppress(*UNREADABLE):  # another process has just built it
                return TokenStore(home, digests)
            directory.mkdir(exist_ok=True)
            was_continued = _write(source, tokenizer, directory, notify, watch)
            source.check_at_rest(digests)
            shutil.rmtree(home, ignore_errors=True)  # a broken store
            move(directory, home)
    except OSError as error:
        raise StorageError(f"{cache}: the token store can't be written: {reason_of(error)}") from None
    try:
        tokens = (home / "tokens.bin").stat()
        if tokens.st_size >= LARGE_BYTES:  # wait until its checksum can be remembered (see `data/text/digests.py`)
            rest_ns = tokens.st_ctime_ns + AT_REST_NS - time.time_ns()
            time.sleep(max(0.0, min(2 * AT_REST_NS, rest_ns) / 1e9 + 0.1))
        store = TokenStore(home, digests)
    except UNREADABLE:
        raise StorageError(f"{home}: not the bytes that were written; check the disk and its free space") from None
    store.is_new, store.was_continued = True, was_continued
    return store


def _write(source: Source, tokenizer: Tokenizer, directory: Path, notify: Notify, watch: Watch) -> bool:
    """Build a store, or continue an unfinished build of it, and return whether there was one.

    Raises DataError for a fault of the text, and OSError if the store can't be written.
    """
    what = f"reading {source.name}"
    notify(what)
    size = source.size()
    with ExitStack() as stack:
        build = Build(directory, stack)
        if build.continued:
            notify(f"continuing after {build.totals['sequences']:,} sequences that are stored already")
        make_encoder = partial(BlockEncoder, source, tokenizer.dumps())
        workers = stack.enter_context(open_workers(make_encoder, size - source.size(build.place.file)))
        for raw, result in workers.work(source.raws(*build.place)):
            build.add(raw, result)
            watch(what, raw.read_bytes, size)
        totals = build.totals
        if not totals["sequences"]:
            empty = f"no text: nothing but {totals['blank']} blank lines"
            if source.part != "all":
                empty = f"data.valid_fraction {source.valid_fraction:g} leaves the {source.part} part without a text"
            raise DataError(f"{source.name}: {empty}")
        checksums = tuple(build.checksums[name] for name in ARRAYS)
        dtype = token_type(tokenizer.vocab_size)
        build.finish(asdict(StoreCounts(**totals, stream=source.stream, dtype=dtype, checksums=checksums)))
        return build.continued
