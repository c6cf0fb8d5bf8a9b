"""How often each token of a text occurs, exactly and in bounded memory.

A count that grows too large is given away as a run: a line for each token, its UTF-8 and its count with a space
between them, sorted by bytes, which is the order of code points. Runs are merged a stretch at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Protocol

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.store.encoding import BlockResult
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.word_index import Keys, WordIndex, cut_words

LEARNT_WORDS = 1 << 18  # after so many the most frequent ones are known
FREQUENT = 1 << 16
HELD_SHORT = 1 << 20  # words of 8 bytes at most: 16 bytes each
HELD_LONG = 1 << 18  # longer words: some 200 bytes each
WRITTEN = 1 << 16  # short words that are made lines at once
MERGED_BYTES = 4 << 20  # of all runs together, in memory at once


class TokenCounts(Protocol):
    """A count under way, which gives runs away when it grows too large."""

    def add(self, texts: Sequence[str]) -> list[bytes]: ...

    def rest(self) -> list[bytes]: ...


class Characters:
    """Counts characters. A run of it is an array instead: (code points,) int64."""

    def __init__(self) -> None:
        self.counts = np.zeros(0x110000, np.int64)

    def add(self, texts: Sequence[str]) -> list[bytes]:
        """Count the characters of some texts."""
        points = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        found = np.bincount(points)
        self.counts[: len(found)] += found
        return []

    def rest(self) -> list[bytes]:
        """All counts."""
        return [self.counts.tobytes()]


class WordCounts:
    """Counts words: frequent ones by their place in an index, short ones as registers, the others one by one."""

    def __init__(self, held_short: int = HELD_SHORT, held_long: int = HELD_LONG, learnt: int = LEARNT_WORDS) -> None:
        self.held_short, self.held_long, self.learnt = held_short, held_long, learnt
        self._frequent: list[str] | None = None  # not known yet
        self._forget()
        self._index, self._places = WordIndex([]), np.zeros(1, np.int64)

    def _forget(self) -> None:
        self._new: list[Keys] = []  # short words as they come, each a big-endian number
        self._keys, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)  # of short words, sorted
        self._long: Counter[bytes] = Counter()

    def add(self, texts: Sequence[str]) -> list[bytes]:
        """Count the words of some texts; runs, if there are too many by now."""
        words = cut_words("\n".join(texts))
        found = self._index.find(words)
        self._places += np.bincount(found, minlength=len(self._places))
        others = np.flatnonzero(found == 0)
        short = words.sizes[others] <= 8
        self._new.append(words.registers(others[short]))
        self._long.update(words.bytes_of(others[~short]))
        if sum(map(len, self._new)) > (self.learnt if self._frequent is None else self.held_short // 2):
            self._gather()
            if self._frequent is None:
                self._learn()
        return self._runs() if len(self._keys) > self.held_short or len(self._long) > self.held_long else []

    def _gather(self) -> None:
        """Add the short words that came to the sorted ones."""
        self._add(*np.unique(np.concatenate([np.zeros(0, np.uint64), *self._new]), return_counts=True))
        self._new = []

    def _add(self, keys: Keys, counts: Ints) -> None:
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
        self._keys, self._counts = keys[first], np.add.reduceat(counts, first) if len(first) else counts

    def _learn(self) -> None:
        """From here on the words that were frequent so far are counted by their place."""
        held = [*_short_words(self._keys, self._counts), *self._long.items()]
        held.sort(key=lambda item: -item[1])
        self._frequent = [word.decode() for word, _ in held[:FREQUENT]]
        self._index = WordIndex(self._frequent)
        self._places = np.zeros(1 + len(self._frequent), np.int64)

    def _runs(self) -> list[bytes]:
        """Give all away that was not counted by its place."""
        self._gather()
        slices = [slice(start, start + WRITTEN) for start in range(0, len(self._keys), WRITTEN)]
        short = b"".join(_lines(_short_words(self._keys[part], self._counts[part])) for part in slices)
        long = _lines(sorted(self._long.items()))
        self._forget()
        return [part for part in (short, long) if part]

    def rest(self) -> list[bytes]:
        """Runs of all that was counted and not given away."""
        words = cut_words("\n".join(self._frequent or ()))
        counts = self._places[1:]
        short = np.flatnonzero((words.sizes <= 8) & (counts > 0))
        long = np.flatnonzero((words.sizes > 8) & (counts > 0))
        self._add(words.registers(short), counts[short])
        for word, count in zip(words.bytes_of(long), counts[long].tolist(), strict=True):
            self._long[word] += count
        return self._runs()


def _short_words(keys: Keys, counts: Ints) -> Iterator[tuple[bytes, int]]:
    return zip(keys.astype(">u8").view("S8").tolist(), counts.tolist(), strict=True)


def _lines(counts: Iterable[tuple[bytes, int]]) -> bytes:
    """The lines of a run; the counts are sorted."""
    return b"".join(b"%b %d\n" % item for item in counts)


class BlockCounter:
    """From a block to the counts of its tokens, which are kept and given away when they are many."""

    def __init__(self, source: Source, kind: str) -> None:
        self.source = source
        self.tally: TokenCounts = Characters() if kind == "char" else WordCounts()
        self._lines_do_not_matter = kind == "word" and source.part == "all"

    def answer(self, raw: RawBlock) -> BlockResult:
        """Count a block; raises DataError with the place of its fault."""
        if self._lines_do_not_matter:
            return BlockResult({}, self.tally.add(self.source.unsplit_texts(raw)))
        return BlockResult({}, self.tally.add(list(filter(str.strip, self.source.kept(self.source.parse(raw)).texts))))

    def rest(self) -> BlockResult:
        """What is left at the end."""
        return BlockResult({}, self.tally.rest())


class _Stretches:
    """A run, read a stretch at a time."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self.handle, self.size = handle, size
        self.words: list[bytes] = []
        self.counts: list[int] = []
        self.whole = False  # whether nothing more is to come

    def fill(self) -> None:
        if not self.words and not self.whole:
            parts = (self.handle.read(self.size) + self.handle.readline()).split()
            self.words, self.counts = parts[::2], list(map(int, parts[1::2]))
            self.whole = not parts

    def take(self, last: bytes | None) -> Iterator[tuple[bytes, int]]:
        """What stands up to here; None: all."""
        count = len(self.words) if last is None else bisect_right(self.words, last)
        taken = zip(self.words[:count], self.counts[:count], strict=True)
        self.words, self.counts = self.words[count:], self.counts[count:]
        return taken


def merge_runs(runs: Sequence[IO[bytes]], held_bytes: int = MERGED_BYTES) -> Iterator[dict[bytes, int]]:
    """The sums of several runs, each word once, a stretch of the alphabet at a time."""
    readers = [_Stretches(handle, max(1, held_bytes // len(runs))) for handle in runs]
    while True:
        for reader in readers:
            reader.fill()
        readers = [reader for reader in readers if not reader.whole]
        if not readers:
            return
        last = min(reader.words[-1] for reader in readers)
        total: dict[bytes, int] = {}
        for reader in readers:
            for word, count in reader.take(last):
                total[word] = total.get(word, 0) + count
        yield total


def most_frequent(parts: Iterable[Mapping[bytes, int]], size: int, least: int, left_out: bytes = b"") -> list[bytes]:
    """The most frequent tokens first, equal counts in the order of their code points.

    Args:
        parts: together they name each token once.
        least: how often a token has to occur.
    """
    best: list[tuple[int, bytes]] = []
    for part in parts:
        best += [(-count, token) for token, count in part.items() if count >= least and token != left_out]
        if len(best) > 2 * size:
            best.sort()
            del best[size:]
    return [token for _, token in sorted(best)[:size]]


def sum_characters(answers: Iterable[bytes]) -> dict[bytes, int]:
    """The sums of what `Characters` gave."""
    total: Ints = np.zeros(0x110000, np.int64)
    for part in answers:
        total += np.frombuffer(part, np.int64)
    points = np.flatnonzero(total).tolist()
    return {chr(point).encode(): int(total[point]) for point in points}
