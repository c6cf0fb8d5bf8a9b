"""From a configuration's files to a tokenizer and token stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lmtrain.config import Config
from lmtrain.data import tokenizer as tokenizers
from lmtrain.data.corpus import Source, TokenStore, open_store
from lmtrain.data.tokenizer import Tokenizer, normalise, train_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, DataError
from lmtrain.files import write_atomically

Notify = Callable[[str], None]


class Corpora(NamedTuple):
    """Everything a training run reads."""

    tokenizer: Tokenizer
    train: TokenStore
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
        ConfigError: a sample prompt that the tokenizer does not take.
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
    if valid_source is None:
        return Corpora(tokenizer, train, None, source.hashes())
    valid = open_store(valid_source, tokenizer, cache, notify)
    for line in _remarks(train, valid, None if train.counts.stream else config.batching.max_length):
        notify(line)
    return Corpora(tokenizer, train, valid, source.hashes() | valid_source.hashes())


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
        long = 0 if max_length is None else store.longer_than(max_length)
        unknown = store.counts.unknown_tokens / max(1, store.counts.tokens)
        if unknown > 0.1:
            lines.append(f"note: {unknown:.0%} of the {name} tokens are unknown to the vocabulary")
        if long:
            lines.append(f"note: {long:,} {name} sequences are longer than {max_length} tokens and are split")
    return lines
