"""What training on a configuration would come to, before anything is trained: `lmtrain check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from lmtrain.config import Config
from lmtrain.data.encoding import encode_block
from lmtrain.data.feeding import Reading, training_reading
from lmtrain.data.preparation import prepare_all, source_of
from lmtrain.data.source import Source
from lmtrain.data.streaming import Stream
from lmtrain.data.tokenizer import IdsTokenizer
from lmtrain.errors import DataError
from lmtrain.runtime import choose_device
from lmtrain.trained import count_weights


def describe(config: Config, notify: Callable[[str], None]) -> Iterator[str]:
    """Lines on the data and the model.

    Raises:
        DataError: the faults of all the files, the first of each.
    """
    choose_device(config.training.device)
    found = {name: source for name in ("train", "valid", "test") if (source := source_of(config, name)) is not None}
    faults = dict.fromkeys(fault for source in found.values() for fault in _faults(config, source))
    if faults:
        raise DataError(*faults)
    tokenizer, stores = prepare_all(config, notify)
    yield f"vocabulary: {tokenizer.vocab_size:,} tokens ({tokenizer.kind})"
    for name, store in stores.items():
        yield f"{name}: {store.counts.summary()}"
    yield _batches(training_reading(config, stores["train"], tokenizer.eos_id))
    weights = count_weights(config, tokenizer.vocab_size)
    trained_mb = 16 * weights / 1e6  # weights, gradients, two moments
    yield f"model: {weights:,} weights, {4 * weights / 1e6:,.1f} MB; with gradients and optimizer {trained_mb:,.1f} MB"


def _faults(config: Config, source: Source) -> Iterator[str]:
    """The first fault of each file."""
    settings = config.tokenizer
    ids = IdsTokenizer(settings.vocab_size, settings.pad_id) if settings.kind == "ids" else None
    for path in source.files:
        try:
            for block in replace(source, files=(path,)).blocks():
                if ids is not None:
                    encode_block(ids, block, block.texts)
        except DataError as error:
            yield from error.faults


def _batches(reading: Reading) -> str:
    parts = reading.sampler.epoch(0)
    if isinstance(reading.source, Stream):
        return f"batches: {len(parts):,} an epoch, {reading.columns} columns of {reading.source.steps:,} tokens"
    rows = reading.source
    longest = np.array([rows.lengths[part].max() for part in parts])
    places = int((longest * np.array([len(part) for part in parts])).sum())
    padding = 1 - int(rows.lengths.sum()) / places
    return f"batches: {len(parts):,} an epoch, {padding:.1%} padding, {rows.split_sequences:,} sequences split"
