"""From a configuration's files to a tokenizer and token stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lmtrain.config import Config
from lmtrain.data.store.build import locked
from lmtrain.data.store.token_store import DIGESTS, TokenStore, open_store
from lmtrain.data.text.digests import Digests, Watch, unwatched
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, DataError, StorageError
from lmtrain.system.console import Notify
from lmtrain.system.files import reason_of, write_atomically

MANY_SEQUENCES = 1 << 22  # that are compared with others only once


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
        "field": data.field,
    }
    paths = {"train": data.train, "valid": data.valid, "test": data.test}[name]
    if data.valid_fraction is not None and name in ("train", "valid"):
        paths, settings = data.train, {**settings, "part": name, "valid_fraction": data.valid_fraction}
    return None if paths is None else Source.of(paths, **settings)


def prepare(config: Config, notify: Notify, tokenizer: Tokenizer | None = None, watch: Watch = unwatched) -> Corpora:
    """Learn the tokenizer from the training text (unless given) and bring the stores up to date.

    Raises:
        ConfigError: a sample prompt that the tokenizer does not take.
        DataError: a fault of the text, with its place.
        ArtefactError: the tokenizer file of kind file can't be used.
        StorageError: the cache directory can't be written.
        OutOfMemoryError: a process that reads text had not enough.
    """
    source, valid_source = source_of(config, "train"), source_of(config, "valid")
    assert source is not None
    cache = Path(config.data.cache_dir)
    digests = Digests(cache / DIGESTS, watch)
    if tokenizer is None:
        tokenizer = _tokenizer(config, source, cache, notify, watch, digests)
    for prompt in config.logging.sample_prompts:
        try:
            tokenizer.encode(normalise(prompt))
        except DataError as error:
            raise ConfigError(f"logging.sample_prompts: {prompt!r}: {error}") from None
    train = open_store(source, tokenizer, cache, notify, watch, digests)
    valid = None if valid_source is None else open_store(valid_source, tokenizer, cache, notify, watch, digests)
    if valid is not None:
        for line in _remarks(train, valid, None if train.counts.stream else config.batching.max_length):
            notify(line)
    files = source.files if valid_source is None else (*source.files, *valid_source.files)
    return Corpora(tokenizer, train, valid, {path: digests.sha256(path) for path in files})


def prepare_all(
    config: Config, notify: Notify, watch: Watch = unwatched, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, dict[str, TokenStore]]:
    """The tokenizer, and the stores of train, valid and test, as far as the configuration has them; raises as
    `prepare`."""
    test = source_of(config, "test")
    corpora = prepare(config, notify, tokenizer, watch)
    stores = {"train": corpora.train, "valid": corpora.valid}
    if test is not None:
        stores["test"] = open_store(test, corpora.tokenizer, config.data.cache_dir, notify, watch)
    return corpora.tokenizer, {name: store for name, store in stores.items() if store is not None}


def _tokenizer(
    config: Config, source: Source, cache: Path, notify: Notify, watch: Watch, digests: Digests
) -> Tokenizer:
    """The tokenizer, learnt once for the same text and settings."""
    settings = config.tokenizer
    if settings.kind in ("byte", "ids", "file"):
        texts: list[str] = []  # nothing to learn
        return train_tokenizer(
            settings.kind, texts, vocab_size=settings.vocab_size, path=settings.path, pad_id=settings.pad_id
        )
    stored = tokenizer_file(config, source, digests)
    if (known := _stored_tokenizer(stored, notify)) is not None:
        return known
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, stored.stem, notify):
            if (known := _stored_tokenizer(stored, notify)) is not None:  # somebody was quicker
                return known
            tokenizer = learn_tokenizer(
                settings.kind, source, cache, settings.vocab_size, settings.min_frequency, notify, watch
            )
            source.check_at_rest(digests)
            write_atomically(stored, tokenizer.dumps().encode())
            return tokenizer
    except DataError as error:
        if str(error).startswith("no token"):
            raise DataError(f"{source.name}: {error} (tokenizer.min_frequency)") from None
        raise
    except OSError as error:
        raise StorageError(f"{cache}: can't be written: {reason_of(error)}; set data.cache_dir") from None


def tokenizer_file(config: Config, source: Source, digests: Digests) -> Path:
    """Where the tokenizer that is learnt from a text is kept."""
    key = source.key(digests, config.tokenizer.model_dump_json())
    return Path(config.data.cache_dir) / f"tokenizer-{key}.json"


def _stored_tokenizer(path: Path, notify: Notify) -> Tokenizer | None:
    if path.exists():
        try:
            return parse_tokenizer(path.read_text(encoding="utf-8"), str(path))
        except (ArtefactError, ValueError):
            notify(f"{path}: damaged; learning the tokenizer again")
    return None


def _remarks(train: TokenStore, valid: TokenStore, max_length: int | None) -> list[str]:
    """What a user should know before training on these; a stream has no rows to compare or to split."""
    lines = []
    known = train.counts.sequences > MANY_SEQUENCES and not train.is_new and not valid.is_new  # told when it was built
    shared, count = 0 if known else valid.overlap(train), valid.counts.sequences
    if shared and max_length is not None:
        lines.append(f"note: {shared:,} of {count:,} validation sequences also stand in the training set")
    for name, store in (("training", train), ("validation", valid)):
        long = 0 if max_length is None or known else store.longer_than(max_length)
        unknown = store.counts.unknown_tokens / max(1, store.counts.tokens)
        if unknown > 0.1:
            lines.append(f"note: {unknown:.0%} of the {name} tokens are unknown to the vocabulary")
        if long:
            lines.append(f"note: {long:,} {name} sequences are longer than {max_length} tokens and are split")
    return lines
