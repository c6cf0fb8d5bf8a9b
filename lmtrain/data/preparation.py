"""Prepares the data of a configuration: learns the tokenizer and builds the token stores, unless the cache has them."""

from pathlib import Path
from typing import Any, NamedTuple

from lmtrain.config import Config
from lmtrain.data.store.build import locked
from lmtrain.data.store.token_store import DIGESTS, TokenStore, open_store
from lmtrain.data.text.digests import Digests, Watch, unwatched
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import repeated_files
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, DataError, StorageError
from lmtrain.system.console import Notify
from lmtrain.system.files import reason_of, write_atomically

MANY_SEQUENCES = 1 << 22  # a training set of more sequences is compared with the validation set only when it is new


class Corpora(NamedTuple):
    """The data that a training run reads."""

    tokenizer: Tokenizer
    train: TokenStore
    valid: TokenStore | None
    hashes: dict[str, str]  # SHA-256 of each file, by its path


def source_of(config: Config, name: str) -> Source | None:
    """Return the source of `train`, `valid` or `test`, or None if the configuration has none.

    Raises:
        DataError: a path or glob that names nothing.
    """
    data, split = config.data, dict[str, Any]()
    paths = getattr(data, name)
    if data.valid_fraction is not None and name in ("train", "valid"):
        paths, split = data.train, {"part": name, "valid_fraction": data.valid_fraction}
    if paths is None:
        return None
    return Source.of(paths, **ways_to_read(config), **split)


def ways_to_read(config: Config) -> dict[str, Any]:
    """Return the fields of `Source` that say how a configuration's files are read."""
    data = config.data
    form = "ids" if config.tokenizer.kind == "ids" else data.format
    ways = {"field": data.field, "separator": data.separator, "encoding": data.encoding, "empty": data.empty}
    return {"format": form, **ways, "stream": config.batching.mode == "stream"}


def prepare(config: Config, notify: Notify, tokenizer: Tokenizer | None = None, watch: Watch = unwatched) -> Corpora:
    """Return the tokenizer and the stores of the training and the validation text.

    What the cache directory does not have is made first; the tokenizer is learnt from the training text unless given.

    Raises:
        ConfigError: the tokenizer can't encode a sample prompt.
        DataError: a fault of the text, with its place.
        ArtefactError: the tokenizer file of kind file can't be used.
        StorageError: the cache directory can't be written.
        OutOfMemoryError: a process that reads text had too little memory.
    """
    source, valid_source = source_of(config, "train"), source_of(config, "valid")
    assert source is not None
    for paths in (config.data.train, config.data.valid or []):
        if repeated := repeated_files(paths):
            notify(f"note: {', '.join(repeated[:5])}: named more than once, and read once")
    for each in (source, valid_source):
        for line in () if each is None or each.part == "valid" else each.notes():
            notify(line)
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
        for line in _notes(train, valid, None if train.counts.stream else config.batching.max_length):
            notify(line)
    files = source.files if valid_source is None else (*source.files, *valid_source.files)
    return Corpora(tokenizer, train, valid, {path: digests.sha256(path) for path in files})


def prepare_all(
    config: Config, notify: Notify, watch: Watch = unwatched, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, dict[str, TokenStore]]:
    """Return the tokenizer, and the stores of those of train, valid and test that the configuration names.

    Arguments and errors are those of `prepare`.
    """
    test = source_of(config, "test")
    corpora = prepare(config, notify, tokenizer, watch)
    stores = {"train": corpora.train, "valid": corpora.valid}
    if test is not None:
        stores["test"] = open_store(test, corpora.tokenizer, config.data.cache_dir, notify, watch)
    return corpora.tokenizer, {name: store for name, store in stores.items() if store is not None}


def _tokenizer(
    config: Config, source: Source, cache: Path, notify: Notify, watch: Watch, digests: Digests
) -> Tokenizer:
    """Return the tokenizer that the cache has for this text and these settings, or learn it."""
    settings = config.tokenizer
    if settings.kind in ("byte", "ids", "file"):
        return train_tokenizer(texts=(), **settings.model_dump())  # these kinds learn nothing
    stored = tokenizer_file(config, source, digests)
    if (cached := _stored_tokenizer(stored, notify)) is not None:
        return cached
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, stored.stem, notify):
            if (cached := _stored_tokenizer(stored, notify)) is not None:  # another process has just learnt it
                return cached
            tokenizer = learn_tokenizer(
                settings.kind,
                source,
                cache,
                notify,
                watch,
                vocab_size=settings.vocab_size,
                min_frequency=settings.min_frequency,
                split=settings.split,
                lowercase=settings.lowercase,
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
    """Return the file of the cache that holds the tokenizer learnt from a text."""
    key = source.key(digests, config.tokenizer.model_dump_json())
    return Path(config.data.cache_dir) / f"tokenizer-{key}.json"


def _stored_tokenizer(path: Path, notify: Notify) -> Tokenizer | None:
    if path.exists():
        try:
            return parse_tokenizer(path.read_text(encoding="utf-8"), str(path))
        except (ArtefactError, ValueError):
            notify(f"{path}: damaged; learning the tokenizer again")
    return None


def _notes(train: TokenStore, valid: TokenStore, max_length: int | None) -> list[str]:
    """Return notes on the data for the user. `max_length` is None for a stream, which has no sequences."""
    lines = []
    was_noted = train.counts.sequences > MANY_SEQUENCES and not train.is_new and not valid.is_new
    shared, count = 0 if was_noted else valid.overlap(train), valid.counts.sequences
    if shared and max_length is not None:
        lines.append(f"note: {shared:,} of {count:,} validation sequences are also in the training set")
    for name, store in (("training", train), ("validation", valid)):
        long = 0 if max_length is None or was_noted else store.longer_than(max_length)
        unknown = store.counts.unknown_tokens / max(1, store.counts.tokens)
        if unknown > 0.1:
            lines.append(f"note: {unknown:.0%} of the {name} tokens are unknown to the vocabulary")
        if long:
            lines.append(f"note: {long:,} {name} sequences are longer than {max_length} tokens and are split")
    return lines
