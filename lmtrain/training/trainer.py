"""The training loop: epochs, steps, validation, saving, stopping. One step is in `step.py`.

Each step depends only on the state after the step before, so a run that is stopped anywhere and resumed continues bit
for bit as if it had never been stopped.
"""

import math
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import BatchLoader, RankShard, StepBatches, TrainingBatches
from lmtrain.data.preparation import Corpora
from lmtrain.errors import DivergedError, StoppedError
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.environment import environment
from lmtrain.runs.ngram_counts import count_columns, read_or_count
from lmtrain.runs.weights import build_model
from lmtrain.system.device import choose_precision, seed_generators, seed_of
from lmtrain.system.processes import SingleProcess
from lmtrain.system.progress import Progress
from lmtrain.training.checkpointer import Checkpointer, flatten_keys
from lmtrain.training.figures import Window, describe_figures
from lmtrain.training.optimization import learning_rate
from lmtrain.training.state import TrainingState
from lmtrain.training.step import StepFigures, TrainingStep
from lmtrain.training.tracking import NullTracker, Tracker
from lmtrain.training.validation import Validation, stalled


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns."""

    run: Path
    step: int
    figures: dict[str, float]  # by tag, of the best validation or, without a validation set, of the last training steps
    best_step: int | None


class Trainer:
    """One training run, from a fresh start or from its last good checkpoint to its end.

    Args:
        opened: closes the metric files and ends the loader's thread when the training ends, or fails to start.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        corpora: Corpora,
        batches: TrainingBatches,
        device: torch.device,
        progress: Progress,
        processes: SingleProcess,
        opened: ExitStack,
    ) -> None:
        self.config, self.run, self.corpora = config, run, corpora
        self.device, self.progress, self.processes, self.opened = device, progress, processes, opened
        seed_generators(config.seed, device)
        self.model = build_model(config, corpora.tokenizer.vocab_size)
        self.model.to(device)
        if processes.rank:  # the weights are equal, but each process draws a dropout of its own
            seed_generators(seed_of(config.seed, 0, processes.rank), device)
        self.step = TrainingStep(config, self.model, batches.columns, processes)
        self.validation = Validation(config, corpora, self.model, self.step.loss_weights, processes)
        self.checkpointer = Checkpointer(run, self.step, corpora, config, processes)
        self._restore_or_begin(batches.columns)
        self.step.precision = self.state.precision
        self._open_loader(batches)
        self.window_start_s = time.monotonic()
        self.figures: dict[str, float] = {}
        self._note_start(batches)

    def _restore_or_begin(self, columns: int | None) -> None:
        """Restore the last good checkpoint, or note the environment in which a new run begins."""
        restored, rank = self.checkpointer.restore(self.progress.note), self.processes.rank
        lengths = {} if restored is None else restored.lengths
        if restored is not None:
            self.state, self.begun_in = restored.state, restored.environment
        else:
            chosen = choose_precision(self.config.training.precision, self.device, self.config.model.largest_layer)
            precision, why = self.processes.broadcast(chosen)
            if self.device.type != "cpu":
                why = f"{why}; {self.model.stack('forward').describe_precision(precision, self.device)}"
            self.progress.note(f"precision {precision}: {why}")
            self.state = TrainingState(precision=precision)
            self.begun_in = {
                **environment(self.device, self.processes.world_size, self.processes.launch),
                "precision": precision,
                "precision_because": why,
            }
            if rank == 0:
                self.run.write_environment(self.begun_in)
        self.tracker = NullTracker() if rank else Tracker(self.run.path, lengths, self.progress.note)
        self.opened.callback(self.tracker.close)
        if self.config.model.ngram_counts is not None:
            self._load_counts(None if restored is None else restored.counts, columns)

    def _load_counts(self, digest: object, columns: int | None) -> None:
        """Give the model its counted n-grams. Rank 0 reads or counts them, and sends them to the other processes, which
        may be on machines that can't see the run directory."""
        config, tokenizer, text = self.config, self.corpora.tokenizer, self.corpora.train

        def on_rank_0() -> tuple[dict[str, torch.Tensor], str, dict[str, torch.Tensor]] | None:
            if self.processes.rank:
                return None
            counts, digest_of_file = read_or_count(self.run.path, digest, config, text, tokenizer, self.progress.note)
            return counts, digest_of_file, count_columns(config, text, tokenizer, columns)

        counted = self.processes.run_in_all(on_rank_0, rank_0_first=True) or ({}, None, {})
        counts, self.checkpointer.counts_digest, of_columns = counted
        self.model.load_counts(
            dict(self.processes.broadcast_tensors(counts)),
            dict(self.processes.broadcast_tensors(of_columns)),
            self.processes.rank * (columns or 0) // self.processes.world_size,
        )

    def _open_loader(self, batches: TrainingBatches) -> None:
        """Begin to load batches from the state's position on, and make several processes ready to train."""
        shard = RankShard(self.processes.rank, self.processes.world_size, batches.columns)
        accumulate, pad_id = self.config.training.accumulate, self.corpora.tokenizer.pad_id
        self.loader = BatchLoader(
            batches, pad_id, accumulate, self.state.epoch, self.state.next_batch, shard, self.step.lay_out
        )
        self.opened.callback(self.loader.close)
        first = self.loader.peek()
        self.epoch_batches = first.epoch_batches
        self.step.warm_up(first.batches[0])
        self.loader.waited_s = self.rank_wait_s = 0.0  # the start does not count as waiting

    def _note_start(self, batches: TrainingBatches) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        self.progress.note(
            f"run {self.run.path}: {count:,} weights, vocabulary {self.corpora.tokenizer.vocab_size:,}, "
            f"{len(batches.source):,} {'sequences' if batches.columns is None else 'columns'}, "
            f"{self.epoch_batches:,} batches an epoch, {self.device.type}, {self.state.precision}"
            f"{f', {self.processes.world_size} processes' if self.processes.under_torchrun else ''}"
        )
        warmup = self.config.schedule.warmup_steps
        if self._steps() < 2 * warmup:
            self.progress.note(
                f"note: {self._steps()} steps in all, {warmup} of warm-up; lower schedule.warmup_steps, or train longer"
            )

    # ---- the loop

    def run_to_end(self, stopped_by: list[int], stop_at_step: int | None) -> TrainingResult:
        """Train until the configured end, a signal, or `stop_at_step`."""
        self.model.train()
        self.elapsed_before_s, self.start_s, self.stopped_by = self.state.elapsed_s, time.monotonic(), stopped_by
        self._synchronise()
        self.saved_s = self.elapsed_s
        if self.state.finished and self._ended():
            self.progress.note(f"the run ended at step {self.state.step} already; nothing to do")
            return self._result()
        self.state.finished = False
        if self.state.validated_step != self.state.step and self._validation_due():  # a signal ended it early
            self._end_step()
        while not self._ended():
            batches = self.loader.take()
            rate, number = self._learning_rate(batches), self.state.step + 1
            figures = self.step(batches.batches, rate, number, self._own_view())
            self._agree(figures.shared)
            self._count(batches, figures)
            if self.state.step % self.config.logging.every_steps == 0:
                self._log_window()
            self.progress.update(self.state.step, self._progress(), self.figures)
            stop = self.state.step == stop_at_step
            self._end_step(stop)
            if stop:
                return self._result()
        return self._finish()

    def _end_step(self, stop: bool = False) -> None:
        """Validate and save if it is time to; raises StoppedError if a signal has come."""
        improved = self._validate() if self._validation_due() else False
        if improved or stop or self.signalled is not None or self._save_due():
            self._save()
        self._check_signals()

    def _check_signals(self) -> None:
        """Raise StoppedError if a signal has come; the state is saved then."""
        if self.signalled is not None:
            raise StoppedError(
                self.signalled,
                f"stopped at step {self.state.step} by {signal.Signals(self.signalled).name}; the state is saved: "
                f"lmtrain train {self.run.path}/config.yaml --run-dir {self.run.path} --resume continues",
            )

    def _ended(self) -> bool:
        training, state = self.config.training, self.state
        return (
            state.epoch >= training.max_epochs
            or (training.max_steps is not None and state.step >= training.max_steps)
            or (training.max_minutes is not None and state.step > 0 and self.elapsed_s >= 60 * training.max_minutes)
            or (training.patience is not None and state.bad_validations >= training.patience)
        )

    def _own_view(self) -> tuple[float, int]:
        """Return the seconds that this process counts for the run, and a signal that reached it (0: none)."""
        return self.elapsed_before_s + time.monotonic() - self.start_s, self.stopped_by[0] if self.stopped_by else 0

    def _agree(self, views: list[list[float]]) -> None:
        """Take rank 0's seconds, and a signal that reached any process, so that all processes decide alike."""
        self.elapsed_s = views[0][0]
        self.signalled = next((int(signal_number) for _, signal_number in views if signal_number), None)

    def _synchronise(self) -> None:
        """Exchange the views of all processes outside a step; a step exchanges them with its nats."""
        self._agree(self.processes.gather(self._own_view()))
        self.step.synchronised_s = time.perf_counter()

    def _progress(self) -> float:
        """The fraction of the training that is done: of its steps, or of its time budget if that is further."""
        training = self.config.training
        done = self.state.step / self._steps()
        if training.max_minutes is not None:
            done = max(done, self.elapsed_s / (60 * training.max_minutes))
        return min(1.0, done)

    def _steps(self) -> float:
        """Optimizer steps until the configured end, patience and time budget aside."""
        training = self.config.training
        steps_an_epoch = -(-self.epoch_batches // training.accumulate)
        return min(training.max_epochs * steps_an_epoch, training.max_steps or math.inf)

    def _learning_rate(self, batches: StepBatches) -> float:
        """Learning rate of the next step. With random chunk lengths it is scaled by the chunk's length (Merity et al.
        2018, https://arxiv.org/abs/1708.02182)."""
        schedule, batching = self.config.schedule, self.config.batching
        settings = schedule.model_dump(exclude={"patience", "factor"})
        peak, state = self.config.optimizer.lr, self.state
        rate = learning_rate(state.step, self._progress(), lr=peak, cut=state.cut, **settings)
        if batching.random_bptt:
            rate *= sum(each.longest - 1 for each in batches.batches) / (len(batches.batches) * batching.bptt)
        return rate

    def _count(self, batches: StepBatches, figures: StepFigures) -> None:
        """Move the counters of the run past a step that is done."""
        state = self.state
        assert (batches.epoch, batches.end) == (state.epoch, state.next_batch + len(batches.batches))
        self.last, self.rank_wait_s = figures, self.rank_wait_s + figures.rank_wait_s
        state.window.add(figures.nats, figures.events, figures.padded_tokens, figures.tokens)
        state.step += 1
        state.next_batch = batches.end
        if batches.ends_epoch:
            state.epoch, state.next_batch = state.epoch + 1, 0
            self.step.end_epoch()
            if not self._ended():
                self.epoch_batches = self.loader.peek().epoch_batches

    # ---- figures and validation

    def _log_window(self) -> None:
        """Write a row of training metrics over the steps since the last one."""
        now_s = time.monotonic()
        elapsed_s = now_s - self.window_start_s
        self.figures = self.state.window.figures(
            self.step.loss_weights, self.last.learning_rate, self.last.gradient_norm, elapsed_s, self.loader.waited_s
        )
        if self.processes.under_torchrun and self.device.type == "cpu":  # on CUDA, passes are only queued here
            self.figures["train/rank_wait_fraction"] = self.rank_wait_s / max(1e-9, elapsed_s)
        self.tracker.log(self.state.step, self._epoch(), self.figures)
        self.state.window, self.window_start_s = Window(), now_s
        self.loader.waited_s = self.rank_wait_s = 0.0

    def _epoch(self) -> float:
        return self.state.epoch + self.state.next_batch / self.epoch_batches

    def _validation_due(self) -> bool:
        every = self.config.validation.every_steps
        return self.state.next_batch == 0 if every is None else self.state.step % every == 0

    def _validate(self) -> bool:
        """Validate, let the model write samples, and log both; True if the loss is the best so far.

        If a signal comes, the validation ends early and changes nothing; the resumed run repeats it.
        """
        started_s, state, improved = time.monotonic(), self.state, False
        self.model.eval()
        with self.step.averaging.applied():
            done = self.validation.run(self.stopped_by, state.precision)
            if done is not None:
                values, samples = done
                self.tracker.log(state.step, self._epoch(), {**values, "samples": samples})
                if self.config.logging.histograms:
                    self.tracker.histograms(state.step, self.model)
        if done is not None:
            state.validated_step = state.step
            improved = self._count_validation(values) if values else False
        self.model.train()
        self._synchronise()
        self.window_start_s += time.monotonic() - started_s  # not part of the training's tokens per second
        return improved

    def _count_validation(self, values: dict[str, float]) -> bool:
        """Take a validation's metrics into the state of the run; True if the loss is the best so far."""
        state, loss = self.state, values["valid/loss"]
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {state.step}: the validation loss is not finite (peak learning rate "
                f"{self.config.optimizer.lr:g}); try a lower optimizer.lr; the weights saved last are sound"
            )
        improved = state.best_loss is None or loss < state.best_loss
        if improved:
            state.best_loss, state.best_step, state.best_figures = loss, state.step, values
        state.bad_validations = 0 if improved else state.bad_validations + 1
        best = " (best)" if improved else ""
        self.progress.note(f"step {state.step}: validation {describe_figures(values)}{best}")
        self._react(loss, improved)
        return improved

    def _react(self, loss: float, improved: bool) -> None:
        """Do what a validation calls for: begin triggered averaging, or cut the learning rate of plateau."""
        state, schedule, averaging = self.state, self.config.schedule, self.step.averaging
        if self.config.averaging.name == "triggered" and not averaging.active:
            state.validation_losses.append(loss)
            if stalled(state.validation_losses, self.config.averaging.trigger):
                averaging.begin()
                self.progress.note(f"step {state.step}: validation has stalled: averaging the weights from here on")
        if schedule.name != "plateau":
            return
        state.stale_validations = 0 if improved else state.stale_validations + 1
        if state.stale_validations >= schedule.patience and state.best_step is not None:
            state.stale_validations, state.cut = 0, state.cut * schedule.factor
            self.progress.note(f"step {state.step}: back to step {state.best_step}, at a lower learning rate")
            self.checkpointer.roll_back(state.best_step, self.progress.note)

    # ---- saving and ending

    def _save_due(self) -> bool:
        settings = self.config.checkpoint
        minutes = (self.elapsed_s - self.saved_s) / 60
        by_steps = settings.every_steps is not None and self.state.step % settings.every_steps == 0
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def _save(self) -> None:
        self.state.elapsed_s = self.saved_s = self.elapsed_s
        self.checkpointer.save(self.state, self.tracker.lengths(), self.begun_in)

    def _finish(self) -> TrainingResult:
        """Validate and save for the last time, and write the hyperparameters for TensorBoard."""
        if self.state.validated_step != self.state.step:
            self._validate()
        if self.state.validated_step != self.state.step:  # a signal ended it early
            self._save()
            self._check_signals()
        flat = flatten_keys(self.config.model_dump())
        figures = {f"hparam/{tag.replace('/', '_')}": value for tag, value in self._figures().items()}
        self.tracker.hyperparameters(flat, figures)
        self.state.finished = True
        self._save()
        return self._result()

    def _figures(self) -> dict[str, float]:
        """The figures of the best validation; without a validation set those of the last training window."""
        tags = [tag for tag in ("train/loss", "train/perplexity") if tag in self.figures]
        return self.state.best_figures or {tag: self.figures[tag] for tag in tags}

    def _result(self) -> TrainingResult:
        return TrainingResult(self.run.path, self.state.step, self._figures(), self.state.best_step)
