"""`lmtrain check CONFIG`: the faults of a configuration and its data, and what training on them would cost."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from lmtrain.check.cost import measure_cost, why_not_measured
from lmtrain.config import Config
from lmtrain.data.batches.loader import TrainingBatches, training_batches
from lmtrain.data.batches.streams import Stream
from lmtrain.data.batches.windows import WINDOW_BYTES, WINDOW_ROWS
from lmtrain.data.preparation import prepare_all, source_of, tokenizer_file
from lmtrain.data.store.token_store import DIGESTS, TokenStore
from lmtrain.data.text.digests import Digests
from lmtrain.data.text.excerpts import Excerpts, excerpts_of, size_of
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.framing import encode_block
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, DataError, DivergedError, out_of_memory
from lmtrain.model.ngrams.counts import COUNTING_BYTES
from lmtrain.runs.environment import device_of
from lmtrain.runs.ngram_counts import check_countable
from lmtrain.runs.weights import count_weights
from lmtrain.system.processes import core_count

LARGE_BYTES = 64 << 20  # if all files together are larger, only excerpts are read
PARTS = ("train", "valid", "test")


def describe_configuration(config: Config, notify: Callable[[str], None]) -> Iterator[str]:
    """Yield lines on the data and the model. For large files they are estimates from excerpts.

    Raises:
        DataError: the first fault of each file; of large files those in the excerpts.
        OutOfMemoryError: a training step does not fit into the memory of this machine.
    """
    device_of(config, notify)
    if size_of(config) > LARGE_BYTES:
        with excerpts_of(config) as excerpts:
            yield from _estimates(config, excerpts)
        return
    faults = _all_faults(config)
    if faults:
        raise DataError(*faults)
    tokenizer, stores = prepare_all(config, notify)
    # these may raise, so they come before any line
    check_countable(config, len(stores["train"].tokens))
    batches = training_batches(config, stores["train"], tokenizer.eos_id)
    yield f"vocabulary: {tokenizer.vocab_size:,} tokens ({tokenizer.kind})"
    for name, store in stores.items():
        yield f"{name}: {store.counts.summary()}"
    yield _batches(batches)
    yield from _training(config, tokenizer, stores["train"], batches, 1.0)


def _estimates(config: Config, excerpts: Excerpts) -> Iterator[str]:
    """Yield the same lines from excerpts, with figures scaled to the size of each corpus."""
    sampled, of = excerpts.config, excerpts.of
    faults = _all_faults(sampled)
    if faults:
        raise DataError(*map(excerpts.named, faults))
    known = _learnt(config)
    start_s = time.process_time()  # time of all threads, which other programs do not change
    try:
        tokenizer, stores = prepare_all(
            sampled, lambda line: None, tokenizer=known
        )  # its notes would speak of excerpts
    except DataError as error:
        raise DataError(*map(excerpts.named, error.faults)) from None
    prepared_s = time.process_time() - start_s
    check_countable(config, round(of["train"].scale * len(stores["train"].tokens)), "about ")
    distinct = {id(each): each for each in of.values()}.values()  # train and valid may be two sides of the same files
    taken, whole = sum(each.taken_bytes for each in distinct), sum(each.all_bytes for each in distinct)
    yield (
        f"estimates (about) from {taken / 1e6:,.1f} MB in pieces of {_about(whole / 1e6)} MB of text; "
        "no fault in these, but only lmtrain prepare reads all"
    )
    learnt = known is None and tokenizer.kind not in ("byte", "ids", "file")
    yield (
        f"vocabulary: {tokenizer.vocab_size:,} tokens "
        f"({tokenizer.kind}{', learnt from these pieces' if learnt else ''})"
    )
    stored_bytes = 0.0
    for name, store in stores.items():
        yield f"{name}: {store.counts.summary(partial(_scaled, scale=of[name].scale))}"
        stored_bytes += of[name].scale * store.size_bytes
    yield _room(config, stored_bytes)
    read = [of[name] for name in ("train", "valid") if name in of]
    scale = sum(each.all_bytes for each in read) / sum(each.taken_bytes for each in read)
    yield f"preparing: about {describe_duration(prepared_s * scale / core_count())} on {core_count()} cores, once"
    batches = training_batches(sampled, stores["train"], tokenizer.eos_id)
    yield _batches(batches, of["train"].scale)
    yield from _training(config, tokenizer, stores["train"], batches, of["train"].scale)


def _learnt(config: Config) -> Tokenizer | None:
    """The tokenizer of the whole text, if one was learnt before; the whole text is hashed to find it."""
    cache, source = Path(config.data.cache_dir), source_of(config, "train")
    if source is None or not any(cache.glob("tokenizer-*.json")):
        return None
    stored = tokenizer_file(config, source, Digests(cache / DIGESTS))
    with suppress(OSError, ValueError, ArtefactError):  # then it is learnt from the excerpts
        return parse_tokenizer(stored.read_text(encoding="utf-8"), str(stored))
    return None


def _room(config: Config, stored_bytes: float) -> str:
    cache = Path(config.data.cache_dir).absolute()
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    line = (
        f"store: about {_about(stored_bytes / 1e6)} MB in {config.data.cache_dir}, where {free / 1e6:,.0f} MB are free"
    )
    return line + (": too few" if stored_bytes > free else "")


def _training(
    config: Config, tokenizer: Tokenizer, store: TokenStore, batches: TrainingBatches, scale: float
) -> Iterator[str]:
    """Yield lines on the model and on what training it costs.

    Args:
        scale: how many times larger the corpus is than what `store` and `batches` hold.
    """
    weights = count_weights(config, tokenizer.vocab_size)
    trained_mb = 16 * weights / 1e6  # weights, gradients and two moments, 4 bytes each
    yield f"model: {weights:,} weights, {4 * weights / 1e6:,.1f} MB; with gradients and optimizer {trained_mb:,.1f} MB"
    if (why := why_not_measured(config, weights)) is not None:
        yield f"time: not measured: {why}"
        return
    try:
        measured = measure_cost(config, tokenizer, store, batches)
    except DivergedError:
        yield "time: not measured: the loss of the first steps is not finite; try a lower optimizer.lr"
        return
    except (RuntimeError, MemoryError) as error:
        if (memory := out_of_memory(error, "lower batching.batch_size or model.hidden_size")) is not None:
            raise memory from None
        raise
    tokens = scale * len(store.tokens)
    if measured.counting is not None:
        taken = f"with about {_about(COUNTING_BYTES * tokens / 1e6)} MB"
        yield f"counting n-grams: about {describe_duration(measured.count_s(tokens))}, once, {taken}"
    where = "of the process" if measured.device.type == "cpu" else "on the device"
    window = 0 if scale == 1 or measured.device.type != "cpu" else WINDOW_BYTES + 48 * WINDOW_ROWS
    peak = measured.peak_bytes(tokens)
    known = "" if peak is None else f"about {_about((peak + window) / 1e6)} MB {where} in training"
    yield f"memory: {known or 'not known on this system'}"
    count = scale * len(batches.sampler.epoch(0))
    epoch_s, whole_s = measured.duration_s(config, scale * store.counts.events, count)
    yield (
        f"time: about {describe_duration(epoch_s)} an epoch, {describe_duration(whole_s)} in all, validation aside: "
        f"{_about(measured.tokens_per_second)} tokens/s over {measured.steps} steps "
        f"({measured.device.type}, {measured.precision})"
    )


def _all_faults(config: Config) -> list[str]:
    """The first fault of each file; equal faults once."""
    sources = [replace(source, part="all") for name in PARTS if (source := source_of(config, name)) is not None]
    return list(dict.fromkeys(fault for source in dict.fromkeys(sources) for fault in _faults(config, source)))


def _faults(config: Config, source: Source) -> Iterator[str]:
    settings = config.tokenizer
    ids = IdsTokenizer(settings.vocab_size, settings.pad_id) if settings.kind == "ids" else None
    for path in source.files:
        try:
            for block in replace(source, files=(path,)).blocks():
                if ids is not None:
                    encode_block(ids, block, block.texts)
        except DataError as error:
            yield from error.faults


def _batches(batches: TrainingBatches, scale: float = 1.0) -> str:
    parts = batches.sampler.epoch(0)
    line = f"batches: {_scaled(len(parts), scale)} an epoch"
    if isinstance(batches.source, Stream):
        return f"{line}, {batches.columns} columns of {_scaled(batches.source.steps, scale)} tokens"
    rows = batches.source
    lengths = [rows.lengths(part) for part in parts]
    places = sum(len(each) * int(each.max()) for each in lengths)
    padding = 1 - sum(int(each.sum()) for each in lengths) / places
    return f"{line}, {padding:.1%} padding, {_scaled(rows.split_sequences, scale)} sequences split"


def _scaled(count: int, scale: float) -> str:
    """A count, or an estimate of it for a larger corpus."""
    return f"{count:,}" if scale == 1 else f"about {_about(scale * count)}"


def _about(number: float) -> str:
    """A number with three digits: 1,230,000."""
    if number <= 0:
        return "0"
    digits = 2 - math.floor(math.log10(number))
    return f"{round(number, digits):,.{max(0, digits)}f}"


def describe_duration(duration_s: float) -> str:
    """Return a duration in the unit that people would use: 45 s, 12.5 min, 3.2 h, 4.1 days."""
    for unit, seconds, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if duration_s / seconds < most:
            return f"{duration_s / seconds:.{2 if duration_s < 10 else 1}f} {unit}"
    return f"{duration_s / 86400:,.1f} days"
