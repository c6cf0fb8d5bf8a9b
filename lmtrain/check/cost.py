"""Measures what training would cost on this machine, by a few of its steps."""

import resource
import time
from contextlib import suppress
from typing import NamedTuple

import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import BatchLoader, TrainingBatches
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.runs.weights import build_model
from lmtrain.system.device import choose_device, choose_precision, keep_freed_memory
from lmtrain.training.step import TrainingStep

MEASURED_S, MOST_STEPS = 1.5, 40  # steps are taken for this long, but at most this many
LEAST_STEPS, LONGEST_S = 3, 6.0  # and at least this many, unless they take this long: batches differ in length
LARGEST_LAYER = 2048  # the orthogonal start values of larger layers take minutes


class Measured(NamedTuple):
    """The cost of a few training steps."""

    tokens_per_second: float
    steps: int
    memory_bytes: int  # the peak of the process, or on the CUDA device
    device: torch.device
    precision: str

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
    model = config.model
    needed, free = 16 * weights, _available_bytes(choose_device(config.training.device))
    if needed > free:
        return f"weights, gradients and optimizer need {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
    if max(model.layer_sizes or [model.hidden_size]) > LARGEST_LAYER:
        return f"with layers of more than {LARGEST_LAYER:,} the start alone takes minutes"
    return None


def measure_cost(config: Config, tokenizer: Tokenizer, batches: TrainingBatches) -> Measured:
    """Train a fresh model for a second or two, with the step that `Trainer` takes; nothing of it is kept."""
    device = choose_device(config.training.device)
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.num_threads or threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            _reset_peak(device)
            model = build_model(config, tokenizer.vocab_size).to(device).train()
            step = TrainingStep(config, model, batches.columns)
            loader = BatchLoader(batches, tokenizer.pad_id, config.training.accumulate, lay_out=step.lay_out)
            try:
                return _measure_steps(config, step, loader)
            finally:
                loader.close()
    finally:
        torch.set_num_threads(threads)


def _measure_steps(config: Config, step: TrainingStep, loader: BatchLoader) -> Measured:
    step.precision, _ = choose_precision(config.training.precision, step.device, config.model.hidden_size)
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
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        taken_s.append(time.perf_counter() - start_s)
    speed = sum(tokens[1:]) / sum(taken_s[1:])  # the first step allocates memory and chooses kernels
    return Measured(speed, len(taken_s) - 1, _peak_bytes(step.device), step.device, step.precision)


def _reset_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as handle:  # Linux; elsewhere the peak is the process's
        handle.write("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _available_bytes(device: torch.device) -> int:
    """Memory that is free or can be freed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError), open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1 << 62
