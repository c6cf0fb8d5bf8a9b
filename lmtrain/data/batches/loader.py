"""Makes the batches that training and evaluation read from a token store.

Shapes: B rows of a batch, or columns of a text whose state is carried; L longest row.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.arrays import Ints
from lmtrain.data.batches.order import EpochSampler, Sampler, WindowSampler
from lmtrain.data.batches.rows import Batch, Rows, Sequences, sorted_parts
from lmtrain.data.batches.streams import LinesSampler, Stream, StreamSampler
from lmtrain.data.batches.windows import WindowedRows, fits_a_window
from lmtrain.data.store.token_store import TokenStore
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.model.objectives import Layout

EVALUATION_TOKENS = 8192  # padded tokens of a batch


class BatchSource(Protocol):
    """Makes batches of the parts that a sampler gives: `Rows` takes row indices, `WindowedRows` stretches, `Stream`
    spans of steps. The rows of a part can be counted and selected without reading their tokens."""

    def lengths(self, part: Any) -> Ints: ...
    def take(self, part: Any, chosen: Ints) -> Any: ...
    def batch(self, part: Any, pad_id: int) -> Batch: ...


class TrainingBatches(NamedTuple):
    """The batches to train on: their source, and a sampler that gives their order."""

    source: Rows | WindowedRows | Stream
    sampler: Sampler
    columns: int | None  # how many columns carry their state from batch to batch; None: each row begins anew


class RankShard(NamedTuple):
    """Which rows of each batch one of several processes reads."""

    rank: int = 0
    world_size: int = 1
    columns: int | None = None  # columns of the whole batch, if they carry their state; None: each row begins anew

    def rows(self, count: int) -> Ints:
        """Return the indices (rows,) of the rows that this rank reads, of a batch's `count` rows, longest first.

        Ranks take turns forth and back, so that all have about the same number of tokens: rows 0 .. 8 go to the ranks
        0 1 2 2 1 0 0 1 2, so rank 0 of three reads rows 0, 5 and 6. Columns stay with one rank, which keeps their
        state: rank 0 of three reads columns 0, 1 and 2 of nine.
        """
        rows = np.arange(count)
        if self.columns is not None:
            rank_columns = self.columns // self.world_size
            return rows[self.rank * rank_columns : (self.rank + 1) * rank_columns]
        turn = rows % (2 * self.world_size)
        own_rows: Ints = rows[np.minimum(turn, 2 * self.world_size - 1 - turn) == self.rank]
        return own_rows


def training_batches(config: Config, store: TokenStore, eos_id: int) -> TrainingBatches:
    """Return the batches to train on; raises ConfigError if a text has fewer tokens or rows than columns."""
    batching, columns = config.batching, config.batching.batch_size
    if batching.mode == "stream":
        _check_columns(columns, len(store.tokens), "tokens")
        stream = Stream(store.tokens, eos_id, columns)
        spans = StreamSampler(stream, bptt=batching.bptt, random_bptt=batching.random_bptt, seed=config.seed)
        return TrainingBatches(stream, spans, columns)
    if batching.carry_state:
        rows = Rows(store, batching.max_length)
        _check_columns(columns, len(rows), "rows")
        return TrainingBatches(rows, LinesSampler(rows, columns), columns)
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
    """Return the rows of a corpus and a sampler that shuffles them: as a whole if they fit a window, else by windows.

    `settings` are the arguments of `EpochSampler` and `WindowSampler`.
    """
    if fits_a_window(sequences):
        rows = Rows(sequences, max_length)
        return rows, EpochSampler(rows.row_lengths, **settings)
    windowed = WindowedRows(sequences, max_length)
    return windowed, WindowSampler(windowed, **settings)


def _check_columns(columns: int, count: int, unit: str) -> None:
    if count < columns:
        raise ConfigError(f"batching.batch_size: {columns} columns for {count} {unit} are too many")


def evaluation_batches(
    config: Config,
    store: TokenStore,
    tokenizer: Tokenizer,
    columns: int,
    batch_size: int | None = None,
    steps: int | None = None,
    shard: RankShard = RankShard(),  # noqa: B008  # can't be changed
) -> tuple[Iterator[Batch], int | None]:
    """Return batches, (L, B) each, with every row of a text once, and how many columns carry their state (or None).

    Args:
        columns: if the state is carried, the largest number of columns in which the text is read.
        batch_size: rows of a batch, if each row begins anew; None: as many as have `EVALUATION_TOKENS`.
        steps: tokens of each column in a batch of a stream; figures do not depend on it.
        shard: what this process reads: of n processes, each reads every n-th batch of rows, or an n-th of the columns.
    """
    batching, pad_id = config.batching, tokenizer.pad_id
    if batching.mode == "stream":
        stream = Stream(store.tokens, tokenizer.eos_id, min(columns, len(store.tokens)))
        steps = steps or max(1, EVALUATION_TOKENS // len(stream))
        spans = stream.spans(np.arange(steps, stream.steps, steps))
        return _column_batches(stream, spans, len(stream), pad_id, shard)
    if not batching.carry_state and not fits_a_window(store):
        windowed = WindowedRows(store, batching.max_length)
        return _row_batches(windowed, windowed.sorted_parts(EVALUATION_TOKENS, batch_size), pad_id, shard), None
    rows = Rows(store, batching.max_length)
    if batching.carry_state:
        columns = min(columns, len(rows))
        return _column_batches(rows, LinesSampler(rows, columns).epoch(0), columns, pad_id, shard)
    return _row_batches(rows, sorted_parts(rows.row_lengths, EVALUATION_TOKENS, batch_size), pad_id, shard), None


def _row_batches(source: BatchSource, parts: Iterator[Any], pad_id: int, shard: RankShard) -> Iterator[Batch]:
    """Make every n-th batch, for n processes."""
    return (source.batch(part, pad_id) for part in islice(parts, shard.rank, None, shard.world_size))


def _column_batches(
    source: BatchSource, parts: Sequence[Any], columns: int, pad_id: int, shard: RankShard
) -> tuple[Iterator[Batch], int]:
    """The batches of a rank's columns, and how many columns it has, perhaps 0."""
    first, end = (columns * rank // shard.world_size for rank in (shard.rank, shard.rank + 1))
    rank_parts = ((part, np.arange(first, min(end, len(source.lengths(part))))) for part in parts)
    batches = (source.batch(source.take(part, chosen), pad_id) for part, chosen in rank_parts if len(chosen))
    return batches, end - first


class RankBatch(NamedTuple):
    """One process's rows of a batch; the counts are those of the whole batch."""

    batch: Batch  # the rows that this process reads
    rows: int  # rows of all processes
    tokens: int  # tokens of these rows
    longest: int  # tokens of the longest of these rows
    idle: bool = False  # this process has no row: it reads one with weight zero, so that it takes part in the step
    layout: Layout | None = None  # of the batch, on the model's device; None: the model lays the batch out itself

    @property
    def order(self) -> Tensor:
        """The order of the batch, (B,), on the model's device if the layout is."""
        return self.batch.order if self.layout is None or self.layout.order is None else self.layout.order


class StepBatches(NamedTuple):
    """The batches of one optimizer step, and where in the epoch they are."""

    batches: list[RankBatch]
    epoch: int
    end: int  # number of batches of the epoch so far, these included
    epoch_batches: int  # batches in the epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether these batches are the last of the epoch."""
        return self.end == self.epoch_batches


class BatchLoader:
    """Loads the batches of each optimizer step while the step before runs, epoch after epoch.

    Args:
        size: batches of a step; the last step of an epoch may have fewer.
        epoch, next_batch: where to begin.
        shard: which rows this process reads.
        lay_out: the loader's thread calls it for each batch, to lay the batch out and move it to the model's device
            (`TrainingStep.lay_out`); None for a model on the CPU.

    Attributes:
        waited_s: seconds that `peek` and `take` waited for batches.
    """

    def __init__(
        self,
        reading: TrainingBatches,
        pad_id: int,
        size: int,
        epoch: int = 0,
        next_batch: int = 0,
        shard: RankShard = RankShard(),  # noqa: B008  # can't be changed
        lay_out: Callable[..., Layout] | None = None,
    ) -> None:
        self.waited_s, self._lay_out = 0.0, lay_out
        self._source: BatchSource = reading.source
        self._pad_id, self._shard = pad_id, shard
        self._steps = self._load_steps(reading.sampler, size, epoch, next_batch)
        self._thread = ThreadPoolExecutor(1, "lmtrain-batches")
        self._next_step = self._thread.submit(next, self._steps)

    def _load_steps(self, sampler: Sampler, size: int, epoch: int, next_batch: int) -> Iterator[StepBatches]:
        while True:
            order = sampler.epoch(epoch)
            for first in range(next_batch, len(order), size):
                batches = list(map(self._load_batch, order[first : first + size]))
                yield StepBatches(batches, epoch, first + len(batches), len(order))
            epoch, next_batch = epoch + 1, 0

    def _load_batch(self, part: Any) -> RankBatch:
        lengths = self._source.lengths(part)
        rows = self._shard.rows(len(lengths))
        rank_part = self._source.take(part, rows if len(rows) else np.zeros(1, np.int64))
        batch = self._source.batch(rank_part, self._pad_id)
        layout = None if self._lay_out is None else self._lay_out(*batch)
        return RankBatch(batch, len(lengths), int(lengths.sum()), int(lengths.max()), not len(rows), layout)

    def peek(self) -> StepBatches:
        """Wait for the next step's batches and return them; `take` returns the same ones."""
        start_s = time.perf_counter()
        step = self._next_step.result()
        self.waited_s += time.perf_counter() - start_s
        return step

    def take(self) -> StepBatches:
        """Wait for the next step's batches and return them; begin to load those of the step after."""
        step = self.peek()
        self._next_step = self._thread.submit(next, self._steps)
        return step

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
