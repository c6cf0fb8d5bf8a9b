"""Learning a tokenizer from a corpus of any size, in bounded memory.

Characters and words are counted exactly. Subwords are learnt from the whole of a text that is small enough, and from
evenly spaced parts of a larger one.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO

from lmtrain.data.building.counting import characters, merged, most_frequent
from lmtrain.data.building.workers import crew
from lmtrain.data.digests import Watch
from lmtrain.data.reading import Raw
from lmtrain.data.source import Source
from lmtrain.data.tokenizer import FIRST, CharTokenizer, Tokenizer, WordTokenizer, no_vocabulary, train_tokenizer

SAMPLE_BYTES = {"bpe": 64 << 20, "unigram": 16 << 20}  # what the library's trainers take 500 MB for
SMALL_RUN_BYTES = 1 << 20  # that is not worth a file

Notify = Callable[[str], None]


def learn(
    kind: str, source: Source, cache: Path, vocab_size: int, min_frequency: int, notify: Notify, watch: Watch
) -> Tokenizer:
    """The tokenizer of a source: char, word, bpe or unigram.

    Args:
        cache: a directory for what does not stay in memory.

    Raises:
        DataError: a fault of the text, with its place; or nothing to learn a vocabulary from.
        OSError: the cache directory can't be written.
    """
    what = f"learning the {kind} vocabulary from {source.name}"
    notify(what)
    if kind in ("bpe", "unigram"):
        size = source.size()
        sample, step = _sample(source, SAMPLE_BYTES[kind], lambda done: watch(what, done, size))
        if step > 1:
            taken = sum(len(raw.data) for raw in sample)
            notify(f"note: of that, {taken / 2**20:,.0f} MiB are learnt from: evenly spaced parts, one in {step}")
        return train_tokenizer(kind, _texts(source, sample), vocab_size=vocab_size)
    with ExitStack() as stack:
        tokens = _count(kind, source, cache, max(1, vocab_size - FIRST), min_frequency, stack, watch, what)
    if not tokens:
        raise no_vocabulary(min_frequency)
    return CharTokenizer(tokens) if kind == "char" else WordTokenizer(tokens)


def _count(
    kind: str, source: Source, cache: Path, size: int, least: int, stack: ExitStack, watch: Watch, what: str
) -> list[str]:
    """The most frequent tokens, best first."""
    runs: list[IO[bytes]] = []
    total_bytes = source.size()
    workers = stack.enter_context(crew({"task": "count", "source": asdict(source), "kind": kind}, [], total_bytes))

    def keep(parts: list[bytes]) -> None:
        for part in parts:
            # without a name: whatever ends this process, nothing is left of it
            large = len(part) > SMALL_RUN_BYTES
            handle: IO[bytes] = tempfile.TemporaryFile(dir=cache) if large else io.BytesIO()  # noqa: SIM115
            stack.callback(handle.close)
            handle.write(part)
            handle.seek(0)
            runs.append(handle)

    for raw, answer in workers.work(source.raws()):
        keep(answer.parts)
        watch(what, raw.read_bytes, total_bytes)
    for answer in workers.rest():
        keep(answer.parts)
    if kind == "char":
        return [token.decode() for token in most_frequent([characters(run.read() for run in runs)], size, least)]
    return [token.decode() for token in most_frequent(merged(runs), size, least, left_out=b"<unk>")]


def _sample(source: Source, most_bytes: int, watch: Callable[[int], None]) -> tuple[list[Raw], int]:
    """Every n-th block of a source, and n: the smallest power of two by which they have no more bytes than that."""
    kept: list[Raw] = []
    held, step = 0, 1
    for number, raw in enumerate(source.raws()):
        watch(raw.read_bytes)
        if number % step:
            continue
        kept.append(raw)
        held += len(raw.data)
        while held > most_bytes and len(kept) > 1:
            kept, step = kept[::2], 2 * step
            held = sum(len(each.data) for each in kept)
    return kept, step


def _texts(source: Source, raws: list[Raw]) -> Iterator[str]:
    for raw in raws:
        yield from filter(str.strip, source.kept(source.parse(raw)).texts)
