"""Learns a tokenizer from a corpus of any size, in bounded memory.

Characters and words are counted exactly. Subwords are learnt from the whole of a small text, and from evenly spaced
parts of a large one.
"""

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

from lmtrain.data.text.digests import Watch
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import FIRST, Tokenizer
from lmtrain.data.tokenizers.boundaries import BoundaryTokenizer, Splitter, mark_breaks, to_token
from lmtrain.data.tokenizers.counting import BlockCounter, merge_runs, most_frequent, sum_characters
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.library import train_library
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer, CharTokenizer, WordTokenizer
from lmtrain.data.tokenizers.word_index import SPACE
from lmtrain.errors import DataError
from lmtrain.system.console import Notify
from lmtrain.system.workers import open_workers

SAMPLE_BYTES = {"bpe": 64 << 20, "unigram": 16 << 20}  # the library's trainers take 500 MB of memory for these
SMALL_RUN_BYTES = 1 << 20  # a run of this size is not worth a file


def learn_tokenizer(
    kind: str,
    source: Source,
    cache: Path,
    notify: Notify,
    watch: Watch,
    *,
    vocab_size: int,
    min_frequency: int = 1,
    split: str = "whitespace",
    lowercase: bool = False,
) -> Tokenizer:
    """Learn a tokenizer of kind char, word, bpe or unigram from a source.

    What does not fit into memory goes to files in `cache`, a directory.

    Raises:
        DataError: the text has a fault, which is named with its place, or there is nothing to learn from.
        OSError: the cache directory can't be written.
    """
    what, size_bytes = f"learning the {kind} vocabulary from {source.name}", source.size()
    notify(what)
    if kind in ("bpe", "unigram"):
        sample, step = _sample(source, SAMPLE_BYTES[kind], lambda done: watch(what, done, size_bytes))
        if step > 1:
            taken = sum(len(raw.data) for raw in sample)
            notify(f"note: learning from {taken / 2**20:,.0f} MiB of it: evenly spaced parts, one in {step}")
        texts = (text for raw in sample for text in source.sequences(source.parse(raw)).texts)
        return train_tokenizer(kind, texts, vocab_size=vocab_size, lowercase=lowercase)
    runs: list[IO[bytes]] = []
    with ExitStack() as stack:

        def store(new_runs: list[bytes]) -> None:
            for run in new_runs:
                # a file without a name: nothing is left of it, whatever ends this process
                large = len(run) > SMALL_RUN_BYTES
                handle: IO[bytes] = tempfile.TemporaryFile(dir=cache) if large else io.BytesIO()  # noqa: SIM115
                stack.callback(handle.close)
                handle.write(run)
                handle.seek(0)
                runs.append(handle)

        workers = stack.enter_context(open_workers(partial(BlockCounter, source, kind, split, lowercase), size_bytes))
        for raw, new_runs in workers.work(source.raws()):
            store(new_runs)
            watch(what, raw.read_bytes, size_bytes)
        for new_runs in workers.finish():
            store(new_runs)
        counts = [sum_characters(run.read() for run in runs)] if kind == "char" else merge_runs(runs)
        decoded = ({word.decode(): count for word, count in part.items()} for part in counts)
        return _from_counts(kind, decoded, vocab_size, min_frequency, split, lowercase)


def _sample(source: Source, most_bytes: int, watch: Callable[[int], None]) -> tuple[list[RawBlock], int]:
    """Return every n-th block, and n: the smallest power of two for which these blocks have at most `most_bytes`."""
    kept: list[RawBlock] = []
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


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 1,
    split: str = "whitespace",
    lowercase: bool = False,
    path: str | None = None,
    pad_id: int = 0,
) -> Tokenizer:
    """Make the tokenizer that a config's `tokenizer` section describes, from the training texts.

    Args:
        texts: read only for a kind that is learnt.
        vocab_size: upper bound, special tokens included; for kind ids the exact number of ids.

    Raises:
        DataError: there is nothing to learn a vocabulary from.
        ArtefactError: for kind file, the file is not a tokenizer.
    """
    if lowercase:
        texts = (normalise(text.lower()) for text in texts)
    match kind:
        case "byte":
            return ByteTokenizer(lowercase)
        case "ids":
            return IdsTokenizer(vocab_size, pad_id)
        case "file":
            assert path is not None
            return SubwordTokenizer(Path(path).read_text(encoding="utf-8", errors="replace"), name=path)
        case "char":
            counts = Counter(chain.from_iterable(texts))
            return _from_counts(kind, [counts], vocab_size, min_frequency, split, lowercase)
        case "word":
            spread = Splitter().spread if split == "words" else partial(map, mark_breaks)
            counts = Counter(chain.from_iterable(map(str.split, spread(texts))))
            return _from_counts(kind, [counts], vocab_size, min_frequency, split, lowercase)
        case _:
            library = train_library(kind, texts, max(257, vocab_size - FIRST))
            return SubwordTokenizer(library, kind, lowercase=lowercase)


def _from_counts(
    kind: str, counts: Iterable[Mapping[str, int]], vocab_size: int, min_frequency: int, split: str, lowercase: bool
) -> Tokenizer:
    """Make a tokenizer of kind char or word; raises DataError if every token was rarer than `min_frequency`."""
    unknown = f"{SPACE}<unk>" if split == "words" else "<unk>"
    words = most_frequent(counts, max(1, vocab_size - FIRST), min_frequency, left_out=unknown)
    if not words:
        raise DataError(f"no token occurs {min_frequency} times or more: there is no vocabulary to learn")
    if kind == "char":
        return CharTokenizer(words, lowercase)
    return (BoundaryTokenizer if split == "words" else WordTokenizer)(list(map(to_token, words)), lowercase)
