"""In which order training reads the rows of a corpus: a function of (seed, epoch), so that a resume takes no replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lmtrain.data.batching import Ints, cut_batches


class Sampler(Protocol):
    """Which parts of a source each batch of an epoch holds, in order: a function of (seed, epoch) alone."""

    def epoch(self, epoch: int) -> Sequence[Any]: ...


class EpochSampler:
    """Which rows each batch of an epoch holds: a function of (seed, epoch) alone.

    Rows are shuffled, cut into buckets of `bucket_batches` batches, sorted by length within each bucket, cut into
    batches, and the batches shuffled. The state of a pass is (epoch, next batch); to resume takes no replay.
    """

    def __init__(
        self, lengths: Ints, *, batch_size: int | None, max_tokens: int | None, bucket_batches: int, seed: int
    ) -> None:
        self.lengths, self.batch_size, self.max_tokens, self.seed = lengths, batch_size, max_tokens, seed
        rows_a_batch = batch_size or max(1, (max_tokens or 1) // max(1, round(float(lengths.mean()))))
        self.bucket_rows = rows_a_batch * bucket_batches

    def epoch(self, epoch: int) -> list[Ints]:
        """The row indices of every batch of an epoch, in order; together each row exactly once."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        shuffled = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(shuffled), self.bucket_rows):
            bucket = shuffled[start : start + self.bucket_rows]
            bucket = bucket[np.argsort(-self.lengths[bucket], kind="stable")]
            for first, end in cut_batches(self.lengths[bucket], self.batch_size, self.max_tokens):
                batches.append(bucket[first:end])
        return [batches[place] for place in random.permutation(len(batches))]
