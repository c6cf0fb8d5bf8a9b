"""What training would cost here: a few of its steps, measured."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from typing import NamedTuple

import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import BatchLoader, StepBatches, TrainingBatches
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import count_events
from lmtrain.model.states import CarriedState
from lmtrain.runs.weights import build_model
from lmtrain.system.device import autocast, choose_device, choose_precision, keep_freed_memory
from lmtrain.system.processes import SingleProcess
from lmtrain.training.averaging import Averaging
from lmtrain.training.optimization import build_optimizers, clip_gradient, optimizer_step, set_learning_rate
from lmtrain.training.parallel import Gradients

MEASURED_S, MOST_STEPS = 1.5, 40  # so long steps are taken, or so many
LEAST_STEPS, LONGEST_S = 3, 6.0  # but so many, unless they take longer: batches differ in length
LARGEST_LAYER = 2048  # orthogonal start values of more take minutes


class Measured(NamedTuple):
    """What a few steps came to."""

    tokens_per_second: float
    steps: int
    memory_bytes: int  # at most at once: of the process, or of the CUDA device
    device: torch.device
    precision: str

    def duration_s(self, config: Config, events: float, batches: float) -> tuple[float, float]:
        """Seconds of an epoch and of all of the training, validation and saving aside.

        Args:
            events, batches: tokens with end tokens, and batches, of an epoch.
        """
        training = config.training
        epoch_s = events / self.tokens_per_second
        steps = max(1.0, batches / training.accumulate)
        whole_s = epoch_s * min(training.max_epochs, (training.max_steps or float("inf")) / steps)
        return epoch_s, min(whole_s, 60 * (training.max_minutes or float("inf")))


def why_not_measured(config: Config, weights: int) -> str | None:
    """What speaks against building the model only to measure it."""
    model = config.model
    needed, there = 16 * weights, _available_bytes(choose_device(config.training.device))
    if needed > there:
        return f"weights, gradients and optimizer need {needed / 1e9:,.1f} GB, and {there / 1e9:,.1f} GB are free"
    if max(model.layer_sizes or [model.hidden_size]) > LARGEST_LAYER:
        return f"with layers of more than {LARGEST_LAYER:,} the start alone takes minutes"
    return None


def measure_cost(config: Config, tokenizer: Tokenizer, reading: TrainingBatches) -> Measured:
    """Train a fresh model for a second or two as `Trainer` would; nothing of it is kept."""
    device = choose_device(config.training.device)
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.num_threads or threads)
    feed = BatchLoader(reading, tokenizer.pad_id, config.training.accumulate)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            _forget_peak(device)
            return _steps(config, build_model(config, tokenizer.vocab_size).to(device).train(), feed, reading, device)
    finally:
        feed.close()
        torch.set_num_threads(threads)


def _steps(
    config: Config, model: LanguageModel, feed: BatchLoader, reading: TrainingBatches, device: torch.device
) -> Measured:
    precision, _ = choose_precision(config.training.precision, device, config.model.hidden_size)
    optimizers = build_optimizers(model, **config.optimizer.model_dump(exclude={"clip_grad_norm"}))
    set_learning_rate(optimizers, config.optimizer.lr / max(1, config.schedule.warmup_steps))
    averaging = Averaging(model, name=config.averaging.name, decay=config.averaging.decay)
    gradients = Gradients(model, SingleProcess())
    carried = None if reading.columns is None else CarriedState(reading.columns)
    weight_of = config.training.loss_weights.model_dump()

    def train(group: StepBatches) -> int:
        """One optimizer step; how many tokens it predicted."""
        counted = [count_events(dealt.rows, dealt.tokens) for dealt in group.batches]
        for batch, *_ in group.batches:
            weights = {name: weight_of[name] / max(1, sum(part[name] for part in counted)) for name in model.objectives}
            before = None if carried is None else carried.of(batch.order)
            losses = gradients.add(batch, weights, before, autocast(precision, device), last=True)
            if carried is not None:
                carried.store(batch.order, losses.state)
        clip_gradient(model.parameters(), config.optimizer.clip_grad_norm)
        optimizer_step(optimizers)
        averaging.update()
        if carried is not None and group.ends_epoch:
            carried.clear()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return sum(part["forward"] for part in counted)

    tokens: list[int] = []
    taken_s: list[float] = []
    while (
        len(taken_s) < 2
        or (sum(taken_s[1:]) < MEASURED_S and len(taken_s) <= MOST_STEPS)
        or (sum(taken_s[1:]) < LONGEST_S and len(taken_s) <= LEAST_STEPS)
    ):
        start_s = time.perf_counter()
        tokens.append(train(feed.take()))
        taken_s.append(time.perf_counter() - start_s)
    speed = sum(tokens[1:]) / sum(taken_s[1:])  # in the first, memory is got and kernels are chosen
    return Measured(speed, len(taken_s) - 1, _peak_bytes(device), device, precision)


def _forget_peak(device: torch.device) -> None:
    """Begin the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as handle:  # Linux; elsewhere it is the process's
        handle.write("5")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _available_bytes(device: torch.device) -> int:
    """Memory that is free, or can be freed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError), open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1 << 62
