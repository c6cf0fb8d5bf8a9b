"""Counts how often each token of a text occurs, exactly and in bounded memory.

A count that grows too large is written out as runs. A run has a line for each token, its UTF-8 and its count with a
space between them, sorted by bytes, which is the order of code points. Runs are merged a part at a time.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, AnyStr

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.boundaries import Splitter, mark_breaks
from lmtrain.data.tokenizers.word_index import Keys, WordIndex, cut_words

LEARNT_WORDS = 1 << 18  # after this many words it is decided which are frequent
FREQUENT = 1 << 16
HELD_SHORT = 1 << 20  # words of 8 bytes at most: 16 bytes of memory each
HELD_LONG = 1 << 18  # longer words: some 200 bytes of memory each
WRITTEN = 1 << 16  # short words that are written as lines at once
MERGED_BYTES = 4 << 20  # bytes of all runs together that are in memory at once


class CharacterCounts:
    """Counts characters. Its only run is an array instead of lines: (0x110000,) int64, by code point."""

    def __init__(self) -> None:
        self.counts = np.zeros(0x110000, np.int64)

    def add(self, texts: Sequence[str]) -> list[bytes]:
        points = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
        counts = np.bincount(points)
        self.counts[: len(counts)] += counts
        return []

    def finish(self) -> list[bytes]:
        return [self.counts.tobytes()]


class WordCounts:
    """Counts words: frequent ones by their position in an index, short ones as numbers, the others one by one.

    `add` returns runs if it has counted too many different words; `finish` returns the counts that are left.
    """

    def __init__(self, held_short: int = HELD_SHORT, held_long: int = HELD_LONG, learnt: int = LEARNT_WORDS) -> None:
        self.held_short, self.held_long, self.learnt = held_short, held_long, learnt
        self._frequent: list[str] | None = None  # None: not known yet
        self._clear()
        self._index, self._frequent_counts = WordIndex([]), np.zeros(1, np.int64)  # 0: words that are not frequent

    def _clear(self) -> None:
        self._new: list[Keys] = []  # short words in the order of the text, each as a big-endian number
        self._keys, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)  # short words, sorted
        self._long: Counter[bytes] = Counter()

    def add(self, texts: Sequence[str]) -> list[bytes]:
        words = cut_words("\n".join(texts))
        positions = self._index.look_up(words)
        self._frequent_counts += np.bincount(positions, minlength=len(self._frequent_counts))
        others = np.flatnonzero(positions == 0)
        short = words.sizes[others] <= 8
        self._new.append(words.registers(others[short]))
        self._long.update(words.bytes_of(others[~short]))
        if sum(map(len, self._new)) > (self.learnt if self._frequent is None else self.held_short // 2):
            self._count_new()
            if self._frequent is None:
                self._learn_frequent()
        return self._runs() if len(self._keys) > self.held_short or len(self._long) > self.held_long else []

    def _count_new(self) -> None:
        self._add_short(*np.unique(np.concatenate([np.zeros(0, np.uint64), *self._new]), return_counts=True))
        self._new = []

    def _add_short(self, keys: Keys, counts: Ints) -> None:
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
        self._keys, self._counts = keys[first], np.add.reduceat(counts, first) if len(first) else counts

    def _learn_frequent(self) -> None:
        """From here on, count the words that were frequent so far by their position."""
        held = [*_short_words(self._keys, self._counts), *self._long.items()]
        held.sort(key=lambda item: -item[1])
        self._frequent = [word.decode() for word, _ in held[:FREQUENT]]
        self._index = WordIndex(self._frequent)
        self._frequent_counts = np.zeros(1 + len(self._frequent), np.int64)

    def _runs(self) -> list[bytes]:
        """Return all counts except those of frequent words as runs, and count anew."""
        self._count_new()
        slices = [slice(start, start + WRITTEN) for start in range(0, len(self._keys), WRITTEN)]
        short = b"".join(_lines(_short_words(self._keys[part], self._counts[part])) for part in slices)
        long = _lines(sorted(self._long.items()))
        self._clear()
        return [part for part in (short, long) if part]

    def finish(self) -> list[bytes]:
        words = cut_words("\n".join(self._frequent or ()))
        counts = self._frequent_counts[1:]
        short = np.flatnonzero((words.sizes <= 8) & (counts > 0))
        long = np.flatnonzero((words.sizes > 8) & (counts > 0))
        self._add_short(words.registers(short), counts[short])
        for word, count in zip(words.bytes_of(long), counts[long].tolist(), strict=True):
            self._long[word] += count
        return self._runs()


def _short_words(keys: Keys, counts: Ints) -> Iterator[tuple[bytes, int]]:
    return zip(keys.astype(">u8").view("S8").tolist(), counts.tolist(), strict=True)


def _lines(counts: Iterable[tuple[bytes, int]]) -> bytes:
    """The lines of a run, from sorted counts."""
    return b"".join(b"%b %d\n" % item for item in counts)


class BlockCounter:
    """Counts the tokens of blocks, as a task of a worker; its results are runs."""

    def __init__(self, source: Source, kind: str, split: str, lowercase: bool) -> None:
        self.source, self.lowercase = source, lowercase
        self._counts = CharacterCounts() if kind == "char" else WordCounts()
        self._splitter = Splitter() if split == "words" else None
        self._has_breaks = kind == "word" and split == "whitespace"  # within a text each is a token
        self._lines_do_not_matter = kind == "word" and split == "whitespace" and source.part == "all"

    def work(self, raw: RawBlock) -> list[bytes]:
        """Count the tokens of a block; raises DataError with the place of its fault."""
        is_unsplit = self._lines_do_not_matter and self.source.has_lines(raw)
        texts = self.source.unsplit_texts(raw) if is_unsplit else self.source.sequences(self.source.parse(raw)).texts
        if self.lowercase:
            texts = [normalise(text.lower()) for text in texts]
        if self._has_breaks and not is_unsplit:
            texts = list(map(mark_breaks, texts))
        return self._counts.add(texts if self._splitter is None else self._splitter.spread(texts))

    def finish(self) -> list[bytes]:
        return self._counts.finish()


def merge_runs(runs: Sequence[IO[bytes]], held_bytes: int = MERGED_BYTES) -> Iterator[dict[bytes, int]]:
    """Add up several runs; yields a part of the alphabet at a time, each word once."""
    size = max(1, held_bytes // max(1, len(runs)))
    held: list[tuple[list[bytes], list[int]]] = [([], []) for _ in runs]  # words of each run in memory, their counts
    while True:
        held = [part if part[0] else _read_part(run, size) for run, part in zip(runs, held, strict=True)]
        if not any(words for words, _ in held):
            return
        last = min(words[-1] for words, _ in held if words)
        total: dict[bytes, int] = {}
        for number, (words, counts) in enumerate(held):
            end = bisect_right(words, last)
            for word, count in zip(words[:end], counts[:end], strict=True):
                total[word] = total.get(word, 0) + count
            held[number] = words[end:], counts[end:]
        yield total


def _read_part(run: IO[bytes], size: int) -> tuple[list[bytes], list[int]]:
    """Read the next words of a run and their counts; there are none at its end."""
    parts = (run.read(size) + run.readline()).split()
    return parts[::2], list(map(int, parts[1::2]))


def most_frequent(parts: Iterable[Mapping[AnyStr, int]], size: int, least: int, left_out: AnyStr) -> list[AnyStr]:
    """Return the `size` most frequent tokens, best first, equal counts in the order of their code points.

    `parts` are counts that together have each token once. A token must occur `least` times and not be `left_out`.
    """
    best: list[tuple[int, AnyStr]] = []
    for part in parts:
        best += [(-count, token) for token, count in part.items() if count >= least and token != left_out]
        if len(best) > 2 * size:
            best.sort()
            del best[size:]
    return [token for _, token in sorted(best)[:size]]


def sum_characters(runs: Iterable[bytes]) -> dict[bytes, int]:
    """Add up the runs of `CharacterCounts`."""
    total: Ints = np.zeros(0x110000, np.int64)
    for run in runs:
        total += np.frombuffer(run, np.int64)
    points = np.flatnonzero(total).tolist()
    return {chr(point).encode(): int(total[point]) for point in points}
