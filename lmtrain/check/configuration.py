"""`lmtrain check CONFIG`: the faults of a configuration and its data, and what training on them would cost."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from lmtrain.check.cost import measure_cost, why_not_measured
from lmtrain.check.data import Finding, examine_data
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
from lmtrain.model.ngrams.counting import COUNTING_BYTES
from lmtrain.runs.environment import device_of
from lmtrain.runs.ngram_counts import check_countable
from lmtrain.runs.weights import count_weights
from lmtrain.system.processes import core_count

LARGE_BYTES = 64 << 20  # if all files together are larger, only excerpts are read
PARTS = ("train", "valid", "test")
MOST_FILES = 4  # that are described


def describe_configuration(config: Config, notify: Callable[[str], None], show: int = 3) -> Iterator[Finding]:
    """Yield findings on the data, and then on what training costs. For large files they are estimates from excerpts.

    The rows of `--json` by their key `about`: `files` (each file as it is understood), `estimates` (only of large
    files), `vocabulary`, `store` (one for each of train, valid, test, with the counts of `lmtrain prepare --json`),
    `sequences` (the first ones as tokens), `longest`, `shortest`, `tokens` (most frequent and rarest), `unknown` (one
    for each store with unknown tokens), `copies` within the training set, `shared` (one for valid and one for test:
    sequences that stand in the training set too), `markup` (one for each kind found), `room` and `preparing` (only of
    large files), `batches`, `model`, `counting`, `memory`, `time`. Counts of large files but those of `store`,
    `batches` and what follows are those of the excerpts.

    Args:
        show: how many sequences are shown as tokens.

    Raises:
        DataError: the first fault of each file; of large files those in the excerpts.
        OutOfMemoryError: a training step does not fit into the memory of this machine.
    """
    device_of(config, notify)
    if size_of(config) > LARGE_BYTES:
        with excerpts_of(config) as excerpts:
            yield from _estimates(config, excerpts, show)
        return
    faults = _all_faults(config)
    if faults:
        raise DataError(*faults)
    tokenizer, stores = prepare_all(config, notify)
    # these may raise, so they come before any line
    check_countable(config, len(stores["train"].tokens))
    batches = training_batches(config, stores["train"], tokenizer.eos_id)
    yield _files(config)
    yield _vocabulary(tokenizer, "")
    yield from (_store(name, store, 1.0) for name, store in stores.items())
    yield from examine_data(config, tokenizer, stores, show)
    yield _batches(batches)
    yield from _training(config, tokenizer, stores["train"], batches, 1.0)


def _estimates(config: Config, excerpts: Excerpts, show: int) -> Iterator[Finding]:
    """Yield the same findings from excerpts, with figures scaled to the size of each corpus."""
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
    yield _files(config)
    line = (
        f"estimates (about) from {taken / 1e6:,.1f} MB in pieces of {_about(whole / 1e6)} MB of text; "
        "no fault in these, but only lmtrain prepare reads all"
    )
    yield Finding("estimates", [line], {"read_bytes": taken, "text_bytes": whole})
    learnt = known is None and tokenizer.kind not in ("byte", "ids", "file")
    yield _vocabulary(tokenizer, ", learnt from these pieces" if learnt else "")
    yield from (_store(name, store, of[name].scale) for name, store in stores.items())
    for finding in examine_data(sampled, tokenizer, stores, show, excerpts.named):
        in_excerpts = finding.about in ("copies", "shared", "tokens", "longest", "shortest", "markup", "unknown")
        yield finding._replace(lines=[f"in the excerpts: {line}" if in_excerpts else line for line in finding.lines])
    yield _room(config, sum(of[name].scale * store.size_bytes for name, store in stores.items()))
    read = [of[name] for name in ("train", "valid") if name in of]
    scale = sum(each.all_bytes for each in read) / sum(each.taken_bytes for each in read)
    preparing_s = prepared_s * scale / core_count()
    line = f"preparing: about {describe_duration(preparing_s)} on {core_count()} cores, once"
    yield Finding("preparing", [line], {"duration_s": preparing_s, "cores": core_count()})
    batches = training_batches(sampled, stores["train"], tokenizer.eos_id)
    yield _batches(batches, of["train"].scale)
    yield from _training(config, tokenizer, stores["train"], batches, of["train"].scale)


def _files(config: Config) -> Finding:
    """How each file is understood: lines for people on some of them, rows for `--json` on all."""
    sources = {name: source for name in PARTS if (source := source_of(config, name)) is not None}
    understood = [(name, source.understood(file)) for name, source in sources.items() for file in source.files]
    rows = [{"store": name, **each._asdict()} for name, each in understood]
    lines = list(dict.fromkeys(str(each) for _, each in understood))
    more = [f"and {len(lines) - MOST_FILES:,} more files"] if len(lines) > MOST_FILES else []
    return Finding("files", lines[:MOST_FILES] + more, {"files": rows})


def _vocabulary(tokenizer: Tokenizer, learnt: str) -> Finding:
    line = f"vocabulary: {tokenizer.vocab_size:,} tokens ({tokenizer.kind}{learnt})"
    return Finding("vocabulary", [line], {"vocabulary": tokenizer.vocab_size, "kind": tokenizer.kind})


def _store(name: str, store: TokenStore, scale: float) -> Finding:
    """What a store holds, scaled to the whole corpus."""
    facts = asdict(store.counts)
    del facts["checksums"]
    for count in ("sequences", "tokens", "unknown_tokens", "characters", "bytes", "blank"):
        facts[count] = round(scale * facts[count])
    line = f"{name}: {store.counts.summary(partial(_scaled, scale=scale))}"
    return Finding("store", [line], {"store": name, "estimated": scale != 1, **facts})


def _learnt(config: Config) -> Tokenizer | None:
    """The tokenizer of the whole text, if one was learnt before; the whole text is hashed to find it."""
    cache, source = Path(config.data.cache_dir), source_of(config, "train")
    if source is None or not any(cache.glob("tokenizer-*.json")):
        return None
    stored = tokenizer_file(config, source, Digests(cache / DIGESTS))
    with suppress(OSError, ValueError, ArtefactError):  # then it is learnt from the excerpts
        return parse_tokenizer(stored.read_text(encoding="utf-8"), str(stored))
    return None


def _room(config: Config, stored_bytes: float) -> Finding:
    cache = Path(config.data.cache_dir).absolute()
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    line = (
        f"store: about {_about(stored_bytes / 1e6)} MB in {config.data.cache_dir}, where {free / 1e6:,.0f} MB are free"
    )
    line += ": too few" if stored_bytes > free else ""
    return Finding("room", [line], {"size_bytes": round(stored_bytes), "free_bytes": free})


def _training(
    config: Config, tokenizer: Tokenizer, store: TokenStore, batches: TrainingBatches, scale: float
) -> Iterator[Finding]:
    """Yield findings on the model and on what training it costs.

    Args:
        scale: how many times larger the corpus is than what `store` and `batches` hold.
    """
    weights = count_weights(config, tokenizer.vocab_size)
    trained_mb = 16 * weights / 1e6  # weights, gradients and two moments, 4 bytes each
    line = f"model: {weights:,} weights, {4 * weights / 1e6:,.1f} MB; with gradients and optimizer {trained_mb:,.1f} MB"
    yield Finding("model", [line], {"weights": weights, "training_bytes": 16 * weights})
    if (why := why_not_measured(config, weights)) is not None:
        yield _not_measured(why)
        return
    try:
        measured = measure_cost(config, tokenizer, store, batches)
    except DivergedError:
        yield _not_measured("the loss of the first steps is not finite; try a lower optimizer.lr")
        return
    except (RuntimeError, MemoryError) as error:
        if (memory := out_of_memory(error, "lower batching.batch_size or model.hidden_size")) is not None:
            raise memory from None
        raise
    tokens = scale * len(store.tokens)
    if measured.counting is not None:
        count_s, count_bytes = measured.count_s(tokens), COUNTING_BYTES * tokens
        line = f"counting n-grams: about {describe_duration(count_s)}, once, with about {_about(count_bytes / 1e6)} MB"
        yield Finding("counting", [line], {"duration_s": count_s, "peak_bytes": round(count_bytes)})
    where = "of the process" if measured.device.type == "cpu" else "on the device"
    window = 0 if scale == 1 or measured.device.type != "cpu" else WINDOW_BYTES + 48 * WINDOW_ROWS
    peak = measured.peak_bytes(tokens)
    known = "not known on this system"
    if peak is not None:
        peak += window
        known = f"about {_about(peak / 1e6)} MB {where} in training"
    yield Finding("memory", [f"memory: {known}"], {"peak_bytes": None if peak is None else round(peak)})
    count = scale * len(batches.sampler.epoch(0))
    epoch_s, whole_s = measured.duration_s(config, scale * store.counts.events, count)
    line = (
        f"time: about {describe_duration(epoch_s)} an epoch, {describe_duration(whole_s)} in all, validation aside: "
        f"{_about(measured.tokens_per_second)} tokens/s over {measured.steps} steps "
        f"({measured.device.type}, {measured.precision})"
    )
    figures = {"epoch_s": epoch_s, "whole_s": whole_s, "tokens_per_second": measured.tokens_per_second}
    yield Finding(
        "time", [line], figures | {"device": measured.device.type, "precision": measured.precision, "reason": None}
    )


def _not_measured(reason: str) -> Finding:
    return Finding("time", [f"time: not measured: {reason}"], {"epoch_s": None, "whole_s": None, "reason": reason})


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
                    encode_block(ids, block)
        except DataError as error:
            yield from error.faults


def _batches(batches: TrainingBatches, scale: float = 1.0) -> Finding:
    parts = batches.sampler.epoch(0)
    line = f"batches: {_scaled(len(parts), scale)} an epoch"
    figures = {"batches": round(scale * len(parts)), "estimated": scale != 1}
    if isinstance(batches.source, Stream):
        line += f", {batches.columns} columns of {_scaled(batches.source.steps, scale)} tokens"
        return Finding("batches", [line], figures | {"columns": batches.columns})
    rows = batches.source
    lengths = [rows.lengths(part) for part in parts]
    places = sum(len(each) * int(each.max()) for each in lengths)
    padding, split = 1 - sum(int(each.sum()) for each in lengths) / places, rows.split_sequences
    line += f", {padding:.1%} padding, {_scaled(split, scale)} sequences split"
    return Finding("batches", [line], figures | {"padding_fraction": padding, "split": round(scale * split)})


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
