"""Measures what training would cost on this machine, by a few of its steps."""

import time
from typing import NamedTuple

import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import BatchLoader, TrainingBatches
from lmtrain.data.store.token_store import TokenStore
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.counting import COUNTING_BYTES
from lmtrain.runs.environment import device_of
from lmtrain.runs.ngram_counts import count_columns, count_text
from lmtrain.runs.weights import build_model
from lmtrain.system.device import choose_precision, scoped_settings, seed_generators, synchronise
from lmtrain.system.memory import free_bytes, peak_bytes, reset_peak
from lmtrain.training.step import TrainingStep

MEASURED_S, MOST_STEPS = 1.5, 40  # steps are taken for this long, but at most this many
LEAST_STEPS, LONGEST_S = 3, 6.0  # and at least this many, unless they take this long: batches differ in length
COUNTED_TOKENS = 1 << 19  # the n-grams of this much text are counted for these steps
LARGEST_LAYER = 2048  # the orthogonal start values of larger layers take minutes


class Counting(NamedTuple):
    """The cost of counting the n-grams of a piece of the text."""

    tokens: int
    took_s: float
    kept_bytes: int  # the tables that the model looks up in


class Measured(NamedTuple):
    """The cost of a few training steps."""

    tokens_per_second: float
    steps: int
    memory_bytes: int | None  # the peak of the process with a save, or on the device; None: not known here
    device: torch.device
    precision: str
    start_bytes: int = 0  # memory of the process before the model was built; 0 on the CUDA device
    counting: Counting | None = None  # None: the model has no counted n-grams

    def peak_bytes(self, tokens: float) -> float | None:
        """The most memory that training takes on a text of this many tokens, start and end tokens included."""
        if self.memory_bytes is None or self.counting is None:
            return self.memory_bytes
        more_tables = self.counting.kept_bytes * (tokens / self.counting.tokens - 1)
        to_count = self.start_bytes + COUNTING_BYTES * tokens if self.device.type == "cpu" else 0
        return max(self.memory_bytes + more_tables, to_count)

    def count_s(self, tokens: float) -> float:
        """Seconds that counting the n-grams of a text of this many tokens takes."""
        return 0.0 if self.counting is None else self.counting.took_s * tokens / self.counting.tokens

    def duration_s(self, config: Config, events: float, batches: float) -> tuple[float, float]:
        """Seconds of one epoch and of the whole training, without validating and saving.

        Args:
            events, batches: tokens predicted in an epoch, end tokens included, and batches of an epoch.
        """
        training = config.training
        epoch_s = events / self.tokens_per_second
        steps = max(1.0, batches / training.accumulate)
        whole_s = epoch_s * min(training.max_epochs, (training.max_steps or float("inf")) / steps)
        return epoch_s, min(whole_s, 60 * (training.max_minutes or float("inf")))


def why_not_measured(config: Config, weights: int) -> str | None:
    """Return why it would take too much memory or time to build this model and measure it; None if it would not."""
    needed, free = 16 * weights, free_bytes(device_of(config))
    if free is not None and needed > free:
        return f"weights, gradients and optimizer need {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
    if config.model.largest_layer > LARGEST_LAYER:
        return f"with layers of more than {LARGEST_LAYER:,} the start alone takes minutes"
    return None


def measure_cost(config: Config, tokenizer: Tokenizer, store: TokenStore, batches: TrainingBatches) -> Measured:
    """Train a fresh model for a second or two, with the step that `Trainer` takes; nothing of it is kept."""
    device = device_of(config)
    with scoped_settings(device, config.training.num_threads):
        seed_generators(config.seed, device)
        reset_peak(device)
        start_bytes = peak_bytes(device) or 0
        model = build_model(config, tokenizer.vocab_size).to(device).train()
        counting = (
            None if config.model.ngram_counts is None else _count(config, tokenizer, store, model, batches.columns)
        )
        step = TrainingStep(config, model, batches.columns)
        loader = BatchLoader(batches, tokenizer.pad_id, config.training.accumulate, lay_out=step.lay_out)
        try:
            measured = _measure_steps(config, step, loader)
        finally:
            loader.close()
    return measured._replace(start_bytes=start_bytes, counting=counting)


def _count(
    config: Config, tokenizer: Tokenizer, store: TokenStore, model: LanguageModel, columns: int | None
) -> Counting:
    """Give the model the counts of the first part of the text, so that the steps look up in tables that hold some."""
    start_s = time.perf_counter()
    counts = count_text(config, store, tokenizer, COUNTED_TOKENS)
    model.load_counts(counts, count_columns(config, store, tokenizer, columns, COUNTED_TOKENS))
    took_s = time.perf_counter() - start_s
    kept_bytes = sum(table.nbytes for table in model.mixtures.buffers())
    return Counting(min(COUNTED_TOKENS, len(store.tokens)), took_s, kept_bytes)


def _measure_steps(config: Config, step: TrainingStep, loader: BatchLoader) -> Measured:
    step.precision, _ = choose_precision(config.training.precision, step.device, config.model.largest_layer)
    rate = config.optimizer.lr / max(1, config.schedule.warmup_steps)
    tokens: list[int] = []
    taken_s: list[float] = []
    while (
        len(taken_s) < 2
        or (sum(taken_s[1:]) < MEASURED_S and len(taken_s) <= MOST_STEPS)
        or (sum(taken_s[1:]) < LONGEST_S and len(taken_s) <= LEAST_STEPS)
    ):
        start_s = time.perf_counter()
        batches = loader.take()
        tokens.append(step(batches.batches, rate).events["forward"])
        if batches.ends_epoch:
            step.end_epoch()
        synchronise(step.device)
        taken_s.append(time.perf_counter() - start_s)
    speed = sum(tokens[1:]) / sum(taken_s[1:])  # the first step allocates memory and chooses kernels
    peak = peak_bytes(step.device)
    if peak is not None and step.device.type == "cpu":
        peak += max(weight.nbytes for weight in step.model.parameters())  # a save writes one tensor at a time
    return Measured(speed, len(taken_s) - 1, peak, step.device, step.precision)
