"""From a configuration's files to a tokenizer and token stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmtrain import checkpoint
from lmtrain.config import Config
from lmtrain.data import tokenizer as tokenizers
from lmtrain.data.batching import EpochSampler, Rows
from lmtrain.data.corpus import Source, TokenStore, open_store
from lmtrain.data.tokenizer import Tokenizer, train_tokenizer
from lmtrain.errors import ArtefactError, DataError

Notify = Callable[[str], None]


class Corpora(NamedTuple):
    """Everything a training run reads."""

    tokenizer: Tokenizer
    train: TokenStore
    valid: TokenStore | None
    hashes: dict[str, str]  # SHA-256 of each file

    def rows(self, max_length: int) -> tuple[Rows, Rows | None]:
        """The rows to train and to validate on."""
        valid = None if self.valid is None else Rows(self.valid, max_length)
        return Rows(self.train, max_length), valid


def sources(config: Config) -> dict[str, Source]:
    """The sources of a configuration, by name: train, and valid and test where there are any."""
    data = config.data
    form = "ids" if config.tokenizer.kind == "ids" else data.format
    settings = {"format": form, "jsonl_field": data.jsonl_field}
    found = {"train": Source.of(data.train, **settings)}
    if data.valid is not None:
        found["valid"] = Source.of(data.valid, **settings)
    elif data.valid_fraction is not None:
        split = {**settings, "valid_fraction": data.valid_fraction}
        found["train"] = Source.of(data.train, part="train", **split)
        found["valid"] = Source.of(data.train, part="valid", **split)
    if data.test is not None:
        found["test"] = Source.of(data.test, **settings)
    return found


def prepare(config: Config, notify: Notify, tokenizer: Tokenizer | None = None) -> Corpora:
    """Learn the tokenizer from the training text (unless given) and bring the stores up to date.

    Raises:
        DataError: a fault of the text, with its place.
        ArtefactError: the tokenizer file of kind file can't be used.
    """
    found = sources(config)
    cache = Path(config.data.cache_dir)
    if tokenizer is None:
        tokenizer = _tokenizer(config, found["train"], cache, notify)
    train = open_store(found["train"], tokenizer, cache, notify)
    if "valid" not in found:
        return Corpora(tokenizer, train, None, found["train"].hashes())
    valid = open_store(found["valid"], tokenizer, cache, notify)
    for line in _remarks(train, valid, config.batching.max_length):
        notify(line)
    return Corpora(tokenizer, train, valid, found["train"].hashes() | found["valid"].hashes())


def epoch_sampler(config: Config, rows: Rows) -> EpochSampler:
    """The sampler of the training rows."""
    batching = config.batching
    return EpochSampler(
        rows.lengths,
        batch_size=None if batching.max_tokens else batching.batch_size,
        max_tokens=batching.max_tokens,
        bucket_batches=batching.bucket_batches,
        seed=config.seed,
    )


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
    checkpoint.write_atomically(stored, tokenizer.dumps().encode())
    return tokenizer


def _remarks(train: TokenStore, valid: TokenStore, max_length: int) -> list[str]:
    """What a user should know before training on these."""
    lines = []
    shared, count = valid.overlap(train), valid.counts.sequences
    if shared:
        lines.append(f"note: {shared:,} of {count:,} validation sequences also stand in the training set")
    for name, store in (("training", train), ("validation", valid)):
        long = Rows(store, max_length).split_sequences
        if long:
            lines.append(f"note: {long:,} {name} sequences are longer than {max_length} tokens and are split")
    return lines
