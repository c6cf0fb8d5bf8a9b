"""The training loop: epochs, steps, validation, saving, stopping.

One optimizer step takes `accumulate` batches. All of it is a function of the state after the step before, so a run
that is stopped anywhere and resumed goes on bit for bit as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import BatchLoader, RankBatch, RankShard, TrainingBatches
from lmtrain.data.preparation import Corpora
from lmtrain.errors import DivergedError, StoppedError
from lmtrain.model.objectives import count_events
from lmtrain.model.states import CarriedState
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.environment import environment
from lmtrain.runs.ngram_counts import count_text
from lmtrain.runs.weights import build_model
from lmtrain.system.device import autocast, choose_precision, seed_of
from lmtrain.system.processes import SingleProcess
from lmtrain.system.progress import Progress
from lmtrain.training.averaging import Averaging
from lmtrain.training.checkpointer import Checkpointer, Restored, flatten_keys
from lmtrain.training.figures import Window, describe_figures
from lmtrain.training.optimization import (
    build_optimizers,
    clip_gradient,
    learning_rate,
    optimizer_step,
    set_learning_rate,
)
from lmtrain.training.parallel import Gradients
from lmtrain.training.state import TrainingState
from lmtrain.training.tracking import NullTracker, Tracker
from lmtrain.training.validation import Validation, stalled


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to."""

    run: Path
    step: int
    figures: dict[str, float]  # by tag: of the best validation; without a validation set the last of training
    best_step: int | None


class Trainer:
    """One run on its way, from a fresh start or from its last good checkpoint."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        corpora: Corpora,
        reading: TrainingBatches,
        device: torch.device,
        progress: Progress,
        start_s: float,
        processes: SingleProcess,
    ) -> None:
        self.config, self.run, self.corpora = config, run, corpora
        self.device, self.progress, self.start_s, self.processes = device, progress, start_s, processes
        tokenizer = corpora.tokenizer
        columns = reading.columns
        share = RankShard(processes.rank, processes.world_size, columns)
        torch.manual_seed(config.seed)
        self.model = build_model(config, tokenizer.vocab_size)
        if config.model.ngram_counts is not None:
            progress.note(f"counting n-grams of up to {config.model.ngram_counts} tokens")
        counts = processes.agree(lambda: count_text(config, corpora.train, tokenizer))
        if counts is not None:
            self.model.load_counts(counts)
        self.model.to(device)
        if processes.rank:  # equal weights, but dropout of its own
            torch.manual_seed(seed_of(config.seed, 0, processes.rank))
        optimizer = config.optimizer
        self.optimizers = build_optimizers(
            self.model,
            name=optimizer.name,
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            muon_lr_scale=optimizer.muon_lr_scale,
            ngram_lr_scale=optimizer.ngram_lr_scale,
        )
        weight_of = config.training.loss_weights.model_dump()
        self.loss_weights = {objective: weight_of[objective] for objective in self.model.objectives}
        self.validation = Validation(config, corpora, self.model, self.loss_weights, processes)
        self.averaging = Averaging(self.model, name=config.averaging.name, decay=config.averaging.decay)
        self.carried = None if columns is None else CarriedState(columns // processes.world_size)
        self.saves = Checkpointer(
            run, self.model, self.optimizers, device, corpora, config, self.averaging, self.carried, processes, counts
        )
        restored = self.saves.restore(progress.note)
        self.saves.keep_counts()
        self.state, lengths, self.begun_in = restored or self._begin()
        self.tracker = NullTracker() if processes.rank else Tracker(run.path, lengths, progress.note)
        place = self.state.epoch, self.state.next_batch
        self.feed = BatchLoader(reading, tokenizer.pad_id, config.training.accumulate, *place, share)
        coming = self.feed.peek()
        self.epoch_batches = coming.epoch_batches
        self.gradients = Gradients(self.model, processes)
        self.gradients.warm_up(coming.batches[0].batch, autocast(self.state.precision, device))
        self.feed.waited_s = self.ranks_waited_s = 0.0  # what the start took is no wait
        self.window_start_s = time.monotonic()
        self.figures: dict[str, float] = {}
        count = sum(parameter.numel() for parameter in self.model.parameters())
        progress.note(
            f"run {run.path}: {count:,} weights, vocabulary {tokenizer.vocab_size:,}, "
            f"{len(reading.source):,} {'sequences' if columns is None else 'columns'}, "
            f"{self.epoch_batches:,} batches an epoch, {device.type}, {self.state.precision}"
            f"{f', {processes.world_size} processes' if processes.together else ''}"
        )
        if self._steps() < 2 * config.schedule.warmup_steps:
            progress.note(
                f"note: {self._steps()} steps in all, {config.schedule.warmup_steps} of warm-up; "
                "lower schedule.warmup_steps, or train longer"
            )

    def _begin(self) -> Restored:
        chosen = choose_precision(self.config.training.precision, self.device, self.config.model.hidden_size)
        precision, why = self.processes.share(chosen)
        self.progress.note(f"precision {precision}: {why}")
        begun_in = {
            **environment(self.device, self.processes.world_size, self.processes.launch),
            "precision": precision,
            "precision_because": why,
        }
        if self.processes.rank == 0:
            self.run.write_environment(begun_in)
        return Restored(TrainingState(precision=precision), {}, begun_in)

    # ---- the loop

    def run_to_end(self, stopped_by: list[int], stop_at_step: int | None) -> TrainingResult:
        """Train until the configured end, a signal, or `stop_at_step`."""
        self.model.train()
        self.elapsed_before_s, self.stopped_by = self.state.elapsed_s, stopped_by
        self._synchronise()
        self.saved_s = self.elapsed_s
        if self.state.finished and self._ended():
            self.progress.note(f"the run ended at step {self.state.step} already; nothing to do")
            return self._result()
        self.state.finished = False
        while not self._ended():
            self._step()
            state, logging = self.state, self.config.logging
            if state.step % logging.every_steps == 0:
                self._log_window()
            self.progress.update(state.step, self._progress(), self.figures)
            improved = self._validate() if self._validation_due() else False
            stop = self.signalled is not None or state.step == stop_at_step
            if improved or stop or self._save_due():
                self._save()
            if self.signalled is not None:
                raise StoppedError(
                    self.signalled,
                    f"stopped at step {state.step} by {signal.Signals(self.signalled).name}; the state is saved: "
                    f"lmtrain train {self.run.path}/config.yaml --run-dir {self.run.path} --resume goes on",
                )
            if stop:
                return self._result()
        return self._finish()

    def _ended(self) -> bool:
        training, state = self.config.training, self.state
        return (
            state.epoch >= training.max_epochs
            or (training.max_steps is not None and state.step >= training.max_steps)
            or (training.max_minutes is not None and self.elapsed_s >= 60 * training.max_minutes)
            or (training.patience is not None and state.bad_validations >= training.patience)
        )

    def _synchronise(self, *values: float) -> list[list[float]]:
        """Bring all processes to one view: of the time that has been worked on this run (rank 0's), of a signal that
        came to any of them, and of each one's values, by rank."""
        elapsed_s = self.elapsed_before_s + time.monotonic() - self.start_s
        met = self.processes.gather([elapsed_s, self.stopped_by[0] if self.stopped_by else 0, *values])
        self.met_s = time.perf_counter()
        self.elapsed_s = met[0][0]
        self.signalled = next((int(signal_number) for _, signal_number, *_ in met if signal_number), None)
        return [own for _, _, *own in met]

    def _progress(self) -> float:
        """Share of the training that is done: of its steps, or of its time budget if more of that is used up."""
        training = self.config.training
        share = self.state.step / self._steps()
        if training.max_minutes is not None:
            share = max(share, self.elapsed_s / (60 * training.max_minutes))
        return min(1.0, share)

    def _steps(self) -> float:
        """Optimizer steps until the configured end, patience and time budget aside."""
        training = self.config.training
        steps_an_epoch = -(-self.epoch_batches // training.accumulate)
        return min(training.max_epochs * steps_an_epoch, training.max_steps or math.inf)

    def _step(self) -> None:
        """One optimizer step. Nats are summed over all its batches and divided once by the number of events."""
        state, optimizer = self.state, self.config.optimizer
        group = self.feed.take()
        assert (group.epoch, group.end) == (state.epoch, state.next_batch + len(group.batches))
        batches = group.batches
        counted = [count_events(dealt.rows, dealt.tokens) for dealt in batches]
        events = {objective: sum(part[objective] for part in counted) for objective in self.loss_weights}
        rate = self._learning_rate(batches)
        set_learning_rate(self.optimizers, rate)
        own, places = dict.fromkeys(self.loss_weights, 0.0), 0
        weights = {name: weight / max(1, events[name]) for name, weight in self.loss_weights.items()}
        for number, (batch, _, _, _, idle) in enumerate(batches, 1):
            carried = None if idle else self.carried
            before = None if carried is None else carried.of(batch.order)
            precision, last = autocast(state.precision, self.device), number == len(batches)
            losses = self.gradients.add(
                batch, dict.fromkeys(weights, 0.0) if idle else weights, before, precision, last
            )
            if carried is not None:
                carried.store(batch.order, losses.state)
            if not idle:
                places += batch.tokens.numel()
                for objective, part in losses.nats.items():
                    own[objective] += float(part)
        met = self._synchronise(self.gradients.complete_s - self.met_s, places, *own.values())
        busy_s, all_places, *all_nats = zip(*met, strict=True)
        self.ranks_waited_s += max(busy_s) - sum(busy_s) / len(busy_s)
        nats = dict(zip(own, map(math.fsum, all_nats), strict=True))
        norm = clip_gradient(self.model.parameters(), optimizer.clip_grad_norm)
        if not math.isfinite(norm) or not all(map(math.isfinite, nats.values())):
            raise DivergedError(
                f"step {state.step + 1}: the loss or its gradient is not finite (learning rate {rate:g}, gradient norm "
                f"{norm:g}); try a lower optimizer.lr, a longer schedule.warmup_steps or a smaller "
                "optimizer.clip_grad_norm; the weights saved last are sound"
            )
        optimizer_step(self.optimizers)
        self.averaging.update()
        self.last_norm, self.last_rate = norm, rate
        state.window.add(nats, events, int(sum(all_places)), sum(dealt.tokens for dealt in batches))
        state.step += 1
        state.next_batch = group.end
        if group.ends_epoch:
            state.epoch, state.next_batch = state.epoch + 1, 0
            if self.carried is not None:
                self.carried.clear()  # the text begins anew
            if not self._ended():
                self.epoch_batches = self.feed.peek().epoch_batches

    def _learning_rate(self, batches: list[RankBatch]) -> float:
        """Of the coming step; in proportion to the length of chunks, where that is drawn, as Merity et al. have it."""
        schedule, batching = self.config.schedule, self.config.batching
        rate = learning_rate(
            self.state.step,
            self._progress(),
            lr=self.config.optimizer.lr,
            name=schedule.name,
            warmup_steps=schedule.warmup_steps,
            final_fraction=schedule.final_fraction,
            hold_fraction=schedule.hold_fraction,
            rise_fraction=schedule.rise_fraction,
            cut=self.state.cut,
        )
        if batching.random_bptt:
            rate *= sum(dealt.longest - 1 for dealt in batches) / (len(batches) * batching.bptt)
        return rate

    # ---- what is reported

    def _log_window(self) -> None:
        """A row of training metrics over the steps since the last one."""
        now_s = time.monotonic()
        elapsed_s = now_s - self.window_start_s
        self.figures = self.state.window.figures(
            self.loss_weights, self.last_rate, self.last_norm, elapsed_s, self.feed.waited_s
        )
        if self.processes.together and self.device.type == "cpu":  # on CUDA passes are only begun here
            self.figures["train/rank_wait_fraction"] = self.ranks_waited_s / max(1e-9, elapsed_s)
        self.tracker.log(self.state.step, self._epoch(), self.figures)
        self.state.window, self.window_start_s = Window(), now_s
        self.feed.waited_s = self.ranks_waited_s = 0.0

    def _epoch(self) -> float:
        return self.state.epoch + self.state.next_batch / self.epoch_batches

    def _validation_due(self) -> bool:
        every = self.config.validation.every_steps
        return self.state.next_batch == 0 if every is None else self.state.step % every == 0

    def _validate(self) -> bool:
        """Validate, let the model write, and log both; True where the loss is the best so far."""
        started_s = time.monotonic()
        state, improved = self.state, False
        state.validated_step = state.step
        self.model.eval()
        with self.averaging.applied():
            with autocast(state.precision, self.device):
                values = self.validation.figures()
            samples = [] if self.processes.rank else self.validation.samples()
            self.tracker.log(state.step, self._epoch(), {**values, "samples": samples})
            if self.config.logging.histograms:
                self.tracker.histograms(state.step, self.model)
        if values:
            loss = values["valid/loss"]
            if not math.isfinite(loss):
                raise DivergedError(
                    f"step {state.step}: the validation loss is not finite (learning rate {self.last_rate:g}); "
                    "try a lower optimizer.lr; the weights saved last are sound"
                )
            improved = state.best_loss is None or loss < state.best_loss
            if improved:
                state.best_loss, state.best_step, state.best_figures = loss, state.step, values
            state.bad_validations = 0 if improved else state.bad_validations + 1
            self.progress.note(
                f"step {state.step}: validation {describe_figures(values)}{' (best)' if improved else ''}"
            )
            self._react(loss, improved)
        self.model.train()
        self._synchronise()
        self.window_start_s += time.monotonic() - started_s  # not part of the training's tokens per second
        return improved

    def _react(self, loss: float, improved: bool) -> None:
        """What a validation changes: the learning rate of plateau, the beginning of triggered averaging."""
        state, schedule = self.state, self.config.schedule
        if self.config.averaging.name == "triggered" and not self.averaging.active:
            state.validation_losses.append(loss)
            if stalled(state.validation_losses, self.config.averaging.trigger):
                self.averaging.begin()
                self.progress.note(f"step {state.step}: validation has stalled: averaging the weights from here on")
        if schedule.name != "plateau":
            return
        state.stale_validations = 0 if improved else state.stale_validations + 1
        if state.stale_validations >= schedule.patience and state.best_step is not None:
            state.stale_validations, state.cut = 0, state.cut * schedule.factor
            self.progress.note(f"step {state.step}: back to step {state.best_step}, at a lower learning rate")
            self.saves.roll_back(state.best_step, self.progress.note)

    # ---- saving and ending

    def _save_due(self) -> bool:
        settings = self.config.checkpoint
        minutes = (self.elapsed_s - self.saved_s) / 60
        by_steps = settings.every_steps is not None and self.state.step % settings.every_steps == 0
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def _save(self) -> None:
        self.state.elapsed_s = self.saved_s = self.elapsed_s
        self.saves.save(self.state, self.tracker.lengths(), self.begun_in)

    def _finish(self) -> TrainingResult:
        """The last validation, the last row of hyperparameters, the last save."""
        if self.state.validated_step != self.state.step:
            self._validate()
        flat = flatten_keys(self.config.model_dump())
        figures = {f"hparam/{tag.replace('/', '_')}": value for tag, value in self._figures().items()}
        self.tracker.hyperparameters(flat, figures)
        self.state.finished = True
        self._save()
        return self._result()

    def _figures(self) -> dict[str, float]:
        """The best validation's; without a validation set the last training window's."""
        window: dict[str, float] = {
            tag: self.figures[tag] for tag in ("train/loss", "train/perplexity") if tag in self.figures
        }
        return self.state.best_figures or window

    def _result(self) -> TrainingResult:
        return TrainingResult(self.run.path, self.state.step, self._figures(), self.state.best_step)

    def close(self) -> None:
        self.tracker.close()
        self.feed.close()
