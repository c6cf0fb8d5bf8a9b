"""What training and evaluation take from the token stores, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmtrain.config import Config
from lmtrain.data.batching import Batch, Rows, Sequences, sorted_batches
from lmtrain.data.corpus import TokenStore
from lmtrain.data.sampling import EpochSampler, Sampler, WindowSampler
from lmtrain.data.streaming import LinesSampler, Stream, StreamSampler
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.windows import WindowedRows, fits_a_window
from lmtrain.errors import ConfigError

EVALUATION_TOKENS = 8192  # padded tokens a batch


class BatchSource(Protocol):
    """What makes a batch out of what a sampler gives: `Rows` of row indices, `WindowedRows` of stretches, a `Stream` of
    a span of steps."""

    def batch(self, part: Any, pad_id: int) -> Batch: ...


class Reading(NamedTuple):
    """How the training text is read."""

    source: Rows | WindowedRows | Stream
    sampler: Sampler
    columns: int | None  # that carry their state from batch to batch; None where each row begins anew


def training_reading(config: Config, store: TokenStore, eos_id: int) -> Reading:
    """The batches to train on.

    Raises:
        ConfigError: a text shorter than its columns are many.
    """
    batching = config.batching
    if batching.mode == "stream":
        stream = _stream(store, eos_id, batching.batch_size)
        spans = StreamSampler(stream, bptt=batching.bptt, random_bptt=batching.random_bptt, seed=config.seed)
        return Reading(stream, spans, batching.batch_size)
    if batching.carry_state:
        rows = Rows(store, batching.max_length)
        if len(rows) < batching.batch_size:
            raise ConfigError(f"batching.batch_size: {batching.batch_size} columns for {len(rows)} rows are too many")
        return Reading(rows, LinesSampler(rows, batching.batch_size), batching.batch_size)
    source, sampler = shuffled_rows(
        store,
        batching.max_length,
        batch_size=None if batching.max_tokens else batching.batch_size,
        max_tokens=batching.max_tokens,
        bucket_batches=batching.bucket_batches,
        seed=config.seed,
    )
    return Reading(source, sampler, None)


def shuffled_rows(
    sequences: Sequences, max_length: int, **settings: Any
) -> tuple[Rows, EpochSampler] | tuple[WindowedRows, WindowSampler]:
    """The rows of a corpus in an order of chance: of all of them where they fit a window, else window by window.

    Args:
        settings: as the samplers take them.
    """
    if fits_a_window(sequences):
        rows = Rows(sequences, max_length)
        return rows, EpochSampler(rows.row_lengths, **settings)
    windowed = WindowedRows(sequences, max_length)
    return windowed, WindowSampler(windowed, **settings)


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
    if not batching.carry_state and not fits_a_window(store):
        windowed = WindowedRows(store, batching.max_length)
        return windowed.sorted_batches(EVALUATION_TOKENS, tokenizer.pad_id, batch_size), None
    rows = Rows(store, batching.max_length)
    if batching.carry_state:
        columns = min(columns, len(rows))
        parts = LinesSampler(rows, columns).epoch(0)
        return (rows.batch(part, tokenizer.pad_id) for part in parts), columns
    return sorted_batches(rows, EVALUATION_TOKENS, tokenizer.pad_id, batch_size), None


class Group(NamedTuple):
    """The batches of one optimizer step, and where they stand in their epoch."""

    batches: list[Batch]
    epoch: int
    end: int  # number of batches of the epoch up to here, these counted
    epoch_batches: int  # batches in the epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether these are the epoch's last."""
        return self.end == self.epoch_batches


class Feed:
    """The groups of batches that training takes, epoch after epoch, each made while the step before it runs.

    Args:
        size: batches in a group; the last one of an epoch may have fewer.
        epoch, next_batch: where to begin.
    """

    def __init__(
        self, source: BatchSource, sampler: Sampler, pad_id: int, size: int, epoch: int = 0, next_batch: int = 0
    ) -> None:
        self.waited_s = 0.0  # altogether
        self._groups = self._walk(source, sampler, pad_id, size, epoch, next_batch)
        self._thread = ThreadPoolExecutor(1, "lmtrain-batches")
        self._coming = self._thread.submit(next, self._groups)

    @staticmethod
    def _walk(
        source: BatchSource, sampler: Sampler, pad_id: int, size: int, epoch: int, next_batch: int
    ) -> Iterator[Group]:
        while True:
            order = sampler.epoch(epoch)
            for first in range(next_batch, len(order), size):
                batches = [source.batch(part, pad_id) for part in order[first : first + size]]
                yield Group(batches, epoch, first + len(batches), len(order))
            epoch, next_batch = epoch + 1, 0

    def peek(self) -> Group:
        """The next group, which stays the next."""
        start_s = time.perf_counter()
        group = self._coming.result()
        self.waited_s += time.perf_counter() - start_s
        return group

    def take(self) -> Group:
        """The next group; the one after it is begun."""
        group = self.peek()
        self._coming = self._thread.submit(next, self._groups)
        return group

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
