"""From a configuration's files to a tokenizer and token stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmtrain.config import Config
from lmtrain.data import tokenizer as tokenizers
from lmtrain.data.batching import Batch, EpochSampler, Rows, Sampler, sorted_batches
from lmtrain.data.corpus import Source, TokenStore, open_store
from lmtrain.data.streaming import LinesSampler, Stream, StreamSampler
from lmtrain.data.tokenizer import Tokenizer, normalise, train_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, DataError
from lmtrain.files import write_atomically

EVALUATION_TOKENS = 8192  # padded tokens a batch

Notify = Callable[[str], None]


class Reading(NamedTuple):
    """How the training text is read."""

    source: Rows | Stream
    sampler: Sampler
    columns: int | None  # that carry their state from batch to batch; None where each row begins anew


class Corpora(NamedTuple):
    """Everything a training run reads."""

    tokenizer: Tokenizer
    train: TokenStore
    reading: Reading  # of the training text
    valid: TokenStore | None
    hashes: dict[str, str]  # SHA-256 of each file


def source_of(config: Config, name: str) -> Source | None:
    """The source of `train`, `valid` or `test`; None where the configuration has none.

    Raises:
        DataError: a path or glob that names nothing.
    """
    data = config.data
    settings: dict[str, Any] = {
        "stream": config.batching.mode == "stream",
        "format": "ids" if config.tokenizer.kind == "ids" else data.format,
        "jsonl_field": data.jsonl_field,
    }
    paths = {"train": data.train, "valid": data.valid, "test": data.test}[name]
    if data.valid_fraction is not None and name in ("train", "valid"):
        paths, settings = data.train, {**settings, "part": name, "valid_fraction": data.valid_fraction}
    return None if paths is None else Source.of(paths, **settings)


def prepare(config: Config, notify: Notify, tokenizer: Tokenizer | None = None) -> Corpora:
    """Learn the tokenizer from the training text (unless given) and bring the stores up to date.

    Raises:
        ConfigError: a sample prompt that the tokenizer does not take, or more columns than the text has tokens.
        DataError: a fault of the text, with its place.
        ArtefactError: the tokenizer file of kind file can't be used.
    """
    source, valid_source = source_of(config, "train"), source_of(config, "valid")
    assert source is not None
    cache = Path(config.data.cache_dir)
    if tokenizer is None:
        tokenizer = _tokenizer(config, source, cache, notify)
    for prompt in config.logging.sample_prompts:
        try:
            tokenizer.encode(normalise(prompt))
        except DataError as error:
            raise ConfigError(f"logging.sample_prompts: {prompt!r}: {error}") from None
    train = open_store(source, tokenizer, cache, notify)
    reading = _reading(config, train, tokenizer.eos_id)
    if valid_source is None:
        return Corpora(tokenizer, train, reading, None, source.hashes())
    valid = open_store(valid_source, tokenizer, cache, notify)
    for line in _remarks(train, valid, None if train.counts.stream else config.batching.max_length):
        notify(line)
    return Corpora(tokenizer, train, reading, valid, source.hashes() | valid_source.hashes())


def _reading(config: Config, store: TokenStore, eos_id: int) -> Reading:
    """The batches to train on.

    Raises:
        ConfigError: a text shorter than its columns are many.
    """
    batching = config.batching
    if batching.mode == "stream":
        stream = _stream(store, eos_id, batching.batch_size)
        sampler = StreamSampler(stream, bptt=batching.bptt, random_bptt=batching.random_bptt, seed=config.seed)
        return Reading(stream, sampler, batching.batch_size)
    rows = Rows(store, batching.max_length)
    if batching.carry_state:
        if len(rows) < batching.batch_size:
            raise ConfigError(f"batching.batch_size: {batching.batch_size} columns for {len(rows)} rows are too many")
        return Reading(rows, LinesSampler(rows, batching.batch_size), batching.batch_size)
    return Reading(
        rows,
        EpochSampler(
            rows.lengths,
            batch_size=None if batching.max_tokens else batching.batch_size,
            max_tokens=batching.max_tokens,
            bucket_batches=batching.bucket_batches,
            seed=config.seed,
        ),
        None,
    )


def _stream(store: TokenStore, eos_id: int, columns: int) -> Stream:
    if len(store.tokens) < columns:
        raise ConfigError(f"batching.batch_size: {columns} columns for {len(store.tokens)} tokens are too many")
    return Stream(store.tokens, eos_id, columns)


def evaluation_batches(
    config: Config,
    store: TokenStore,
    tokenizer: Tokenizer,
    columns: int,
    batch_size: int | None = None,
    steps: int | None = None,
) -> tuple[Iterator[Batch], int | None]:
    """Every row of a text once, for scoring, and the number of columns that carry their state, or None.

    Args:
        columns: in which a text that goes on is read, at most.
        batch_size: rows at once of a text whose rows begin anew.
        steps: tokens of each column in a batch of a stream; the figures do not depend on it.
    """
    batching = config.batching
    if batching.mode == "stream":
        stream = Stream(store.tokens, tokenizer.eos_id, min(columns, len(store.tokens)))
        steps = steps or max(1, EVALUATION_TOKENS // len(stream))
        spans = stream.spans(np.arange(steps, stream.steps, steps))
        return (stream.batch(span, tokenizer.pad_id) for span in spans), len(stream)
    rows = Rows(store, batching.max_length)
    if batching.carry_state:
        columns = min(columns, len(rows))
        parts = LinesSampler(rows, columns).epoch(0)
        return (rows.batch(part, tokenizer.pad_id) for part in parts), columns
    return sorted_batches(rows, EVALUATION_TOKENS, tokenizer.pad_id, batch_size), None


def _tokenizer(config: Config, source: Source, cache: Path, notify: Notify) -> Tokenizer:
    """The tokenizer, learnt once for the same text and settings."""
    settings = config.tokenizer
    if settings.kind in ("byte", "ids", "file"):
        texts: list[str] = []  # nothing to learn
        return train_tokenizer(
            settings.kind, texts, vocab_size=settings.vocab_size, path=settings.path, pad_id=settings.pad_id
        )
    stored = cache / f"tokenizer-{source.key(settings.model_dump_json())}.json"
    if stored.exists():
        try:
            return tokenizers.loads(stored.read_text(encoding="utf-8"), str(stored))
        except (ArtefactError, ValueError):
            notify(f"{stored}: damaged; learning the tokenizer again")
    notify(f"learning the {settings.kind} vocabulary from {', '.join(source.files)}")
    try:
        tokenizer = train_tokenizer(
            settings.kind,
            source.texts(),
            vocab_size=settings.vocab_size,
            min_frequency=settings.min_frequency,
        )
    except DataError as error:
        if str(error).startswith("no token"):
            raise DataError(f"{', '.join(source.files)}: {error} (tokenizer.min_frequency)") from None
        raise
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(stored, tokenizer.dumps().encode())
    return tokenizer


def _remarks(train: TokenStore, valid: TokenStore, max_length: int | None) -> list[str]:
    """What a user should know before training on these; a stream has no rows to compare or to split."""
    lines = []
    shared, count = valid.overlap(train), valid.counts.sequences
    if shared and max_length is not None:
        lines.append(f"note: {shared:,} of {count:,} validation sequences also stand in the training set")
    for name, store in (("training", train), ("validation", valid)):
        long = 0 if max_length is None else Rows(store, max_length).split_sequences
        unknown = store.counts.unknown_tokens / max(1, store.counts.tokens)
        if unknown > 0.1:
            lines.append(f"note: {unknown:.0%} of the {name} tokens are unknown to the vocabulary")
        if long:
            lines.append(f"note: {long:,} {name} sequences are longer than {max_length} tokens and are split")
    return lines
