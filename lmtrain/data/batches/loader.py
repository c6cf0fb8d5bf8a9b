"""What training and evaluation take from the token stores, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmtrain.config import Config
from lmtrain.data.arrays import Ints
from lmtrain.data.batches.order import EpochSampler, Sampler, WindowSampler
from lmtrain.data.batches.rows import Batch, Rows, Sequences, sorted_parts
from lmtrain.data.batches.streams import LinesSampler, Stream, StreamSampler
from lmtrain.data.batches.windows import WindowedRows, fits_a_window
from lmtrain.data.store.token_store import TokenStore
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError

EVALUATION_TOKENS = 8192  # padded tokens a batch


class BatchSource(Protocol):
    """What makes a batch out of what a sampler gives: `Rows` of row indices, `WindowedRows` of stretches, a `Stream` of
    a span of steps."""

    def lengths(self, part: Any) -> Ints: ...

    def take(self, part: Any, places: Ints) -> Any: ...

    def batch(self, part: Any, pad_id: int) -> Batch: ...

    def __len__(self) -> int: ...


class TrainingBatches(NamedTuple):
    """How the training text is read."""

    source: Rows | WindowedRows | Stream
    sampler: Sampler
    columns: int | None  # that carry their state from batch to batch; None where each row begins anew


class RankShard(NamedTuple):
    """What one of several processes reads of each batch."""

    rank: int = 0
    world_size: int = 1
    columns: int | None = None  # of the whole batch, where these carry their state; None: rows begin anew

    def places(self, count: int) -> Ints:
        """Of `count` rows, longest first, or columns, those of this rank.

        Rows are dealt out forth and back, 0 1 2 2 1 0 0 1 2, so that all have about the same number of tokens; columns
        stay with one process, which keeps their state.
        """
        places = np.arange(count)
        if self.columns is not None:
            each = self.columns // self.world_size
            return places[self.rank * each : (self.rank + 1) * each]
        turn = places % (2 * self.world_size)
        own: Ints = places[np.minimum(turn, 2 * self.world_size - 1 - turn) == self.rank]
        return own


def training_batches(config: Config, store: TokenStore, eos_id: int) -> TrainingBatches:
    """The batches to train on.

    Raises:
        ConfigError: a text shorter than its columns are many.
    """
    batching = config.batching
    if batching.mode == "stream":
        stream = _stream(store, eos_id, batching.batch_size)
        spans = StreamSampler(stream, bptt=batching.bptt, random_bptt=batching.random_bptt, seed=config.seed)
        return TrainingBatches(stream, spans, batching.batch_size)
    if batching.carry_state:
        rows = Rows(store, batching.max_length)
        if len(rows) < batching.batch_size:
            raise ConfigError(f"batching.batch_size: {batching.batch_size} columns for {len(rows)} rows are too many")
        return TrainingBatches(rows, LinesSampler(rows, batching.batch_size), batching.batch_size)
    source, sampler = shuffled_rows(
        store,
        batching.max_length,
        batch_size=None if batching.max_tokens else batching.batch_size,
        max_tokens=batching.max_tokens,
        bucket_batches=batching.bucket_batches,
        seed=config.seed,
    )
    return TrainingBatches(source, sampler, None)


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
    share: RankShard = RankShard(),  # noqa: B008  # can't be changed
) -> tuple[Iterator[Batch], int | None]:
    """Every row of a text once, for scoring, and the number of columns that carry their state, or None.

    Args:
        columns: in which a text that goes on is read, at most.
        batch_size: rows at once of a text whose rows begin anew.
        steps: tokens of each column in a batch of a stream; the figures do not depend on it.
        share: of this process, where several read together: of rows one batch in so many, of columns some.
    """
    batching, pad_id = config.batching, tokenizer.pad_id
    if batching.mode == "stream":
        stream = Stream(store.tokens, tokenizer.eos_id, min(columns, len(store.tokens)))
        steps = steps or max(1, EVALUATION_TOKENS // len(stream))
        spans = stream.spans(np.arange(steps, stream.steps, steps))
        return _in_columns(stream, spans, len(stream), pad_id, share)
    if not batching.carry_state and not fits_a_window(store):
        windowed = WindowedRows(store, batching.max_length)
        return _dealt(windowed, windowed.sorted_parts(EVALUATION_TOKENS, batch_size), pad_id, share), None
    rows = Rows(store, batching.max_length)
    if batching.carry_state:
        columns = min(columns, len(rows))
        return _in_columns(rows, LinesSampler(rows, columns).epoch(0), columns, pad_id, share)
    return _dealt(rows, sorted_parts(rows.row_lengths, EVALUATION_TOKENS, batch_size), pad_id, share), None


def _dealt(source: BatchSource, parts: Iterator[Any], pad_id: int, share: RankShard) -> Iterator[Batch]:
    """One batch in so many."""
    return (source.batch(part, pad_id) for part in islice(parts, share.rank, None, share.world_size))


def _in_columns(
    source: BatchSource, parts: Sequence[Any], columns: int, pad_id: int, share: RankShard
) -> tuple[Iterator[Batch], int]:
    """The batches of a share's columns, and how many these are; of fewer columns than processes, some have none."""
    first, end = (columns * rank // share.world_size for rank in (share.rank, share.rank + 1))
    own = ((part, np.arange(first, min(end, len(source.lengths(part))))) for part in parts)
    return (source.batch(source.take(part, places), pad_id) for part, places in own if len(places)), end - first


class RankBatch(NamedTuple):
    """A batch as one process has it."""

    batch: Batch  # of its own rows
    rows: int  # of all processes
    tokens: int  # of these
    longest: int
    idle: bool = False  # no row of it is this process's: one that weighs nothing is there for all to keep step


class StepBatches(NamedTuple):
    """The batches of one optimizer step, and where they stand in their epoch."""

    batches: list[RankBatch]
    epoch: int
    end: int  # number of batches of the epoch up to here, these counted
    epoch_batches: int  # batches in the epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether these are the epoch's last."""
        return self.end == self.epoch_batches


class BatchLoader:
    """The groups of batches that training takes, epoch after epoch, each made while the step before it runs.

    Args:
        size: batches in a group; the last one of an epoch may have fewer.
        epoch, next_batch: where to begin.
        share: of this process, where several read together.
    """

    def __init__(
        self,
        reading: TrainingBatches,
        pad_id: int,
        size: int,
        epoch: int = 0,
        next_batch: int = 0,
        share: RankShard = RankShard(),  # noqa: B008  # can't be changed
    ) -> None:
        self.waited_s = 0.0  # altogether
        self._source: BatchSource = reading.source
        self._pad_id, self._share = pad_id, share
        self._groups = self._walk(reading.sampler, size, epoch, next_batch)
        self._thread = ThreadPoolExecutor(1, "lmtrain-batches")
        self._coming = self._thread.submit(next, self._groups)

    def _walk(self, sampler: Sampler, size: int, epoch: int, next_batch: int) -> Iterator[StepBatches]:
        while True:
            order = sampler.epoch(epoch)
            for first in range(next_batch, len(order), size):
                batches = list(map(self._deal, order[first : first + size]))
                yield StepBatches(batches, epoch, first + len(batches), len(order))
            epoch, next_batch = epoch + 1, 0

    def _deal(self, part: Any) -> RankBatch:
        lengths = self._source.lengths(part)
        places = self._share.places(len(lengths))
        own = self._source.take(part, places if len(places) else np.zeros(1, np.int64))
        batch = self._source.batch(own, self._pad_id)
        return RankBatch(batch, len(lengths), int(lengths.sum()), int(lengths.max()), idle=not len(places))

    def peek(self) -> StepBatches:
        """The next group, which stays the next."""
        start_s = time.perf_counter()
        group = self._coming.result()
        self.waited_s += time.perf_counter() - start_s
        return group

    def take(self) -> StepBatches:
        """The next group; the one after it is begun."""
        group = self.peek()
        self._coming = self._thread.submit(next, self._groups)
        return group

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
