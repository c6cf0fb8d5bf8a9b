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

from lmtrain.config import Config, load_config
from lmtrain.data.batching import Feed, sorted_batches
from lmtrain.data.preparation import Corpora, epoch_sampler, prepare
from lmtrain.errors import DivergedError, StoppedError
from lmtrain.inference.generation import generate
from lmtrain.inference.scoring import evaluate
from lmtrain.model.language_model import count_events
from lmtrain.run import RunDirectory, build_model, create_run, find_resumable, refuse_full
from lmtrain.runtime import (
    autocast,
    choose_device,
    choose_precision,
    environment,
    keep_freed_memory,
    noted_signals,
    out_of_memory,
)
from lmtrain.training.figures import Window, in_words, validation_figures
from lmtrain.training.optimization import build_optimizer, clip_gradient, learning_rate, set_learning_rate, step
from lmtrain.training.resuming import Restored, Saves, TrainingState, check_unchanged, flatten
from lmtrain.training.tracking import Progress, Quiet, Tracker

VALIDATION_TOKENS = 8192  # padded tokens a batch


@dataclass(frozen=True)
class TrainingResult:
    """What a training run came to."""

    run: Path
    step: int
    figures: dict[str, float]  # by tag: of the best validation; without a validation set the last of training
    best_step: int | None


def train(
    config: Config | str | Path,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    stop_at_step: int | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train the model that a configuration describes.

    Args:
        config: a configuration, or the path of its file.
        run_dir: the run directory, new or empty; default `runs_dir/name`, with -2, -3 ... where that is taken.
        resume: go on from the last good checkpoint, where there is one.
        stop_at_step: save and stop after this step, as a signal would make it.

    Raises:
        LmtrainError: a fault of config, data, run directory or machine; see `lmtrain.errors` for its kinds.
        StoppedError: a signal ended it; its state is saved.
    """
    start_s = time.monotonic()
    config = config if isinstance(config, Config) else load_config(config)
    progress = progress or Quiet()
    named = None if run_dir is None else str(run_dir)
    run = find_resumable(config, named) if resume else None
    if run is None and named is not None:
        refuse_full(named)
    if resume and run is None:
        progress.note("nothing to resume yet: starting afresh")
    if run is not None:
        run.refuse_links()
        check_unchanged(run.config(), config)
    device = choose_device(config.training.device)
    keep_freed_memory()
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    tokenizer = None if run is None else run.tokenizer()
    corpora = prepare(config, progress.note, tokenizer)  # before the run directory: its faults leave nothing behind
    new = run is None
    run = run or create_run(config, named)
    with run.locked():
        if new:
            run.write_start(config, corpora.tokenizer, environment(device))
        else:
            run.write_config(config)  # with what may change in a resume
        trainer = None
        try:
            trainer = Trainer(config, run, corpora, device, progress, start_s)
            with noted_signals() as stopped_by:
                return trainer.run_to_end(stopped_by, stop_at_step)
        except (RuntimeError, MemoryError) as error:
            batching = config.batching
            size = (
                f"max_tokens (now {batching.max_tokens})"
                if batching.max_tokens
                else f"batch_size (now {batching.batch_size})"
            )
            if (memory := out_of_memory(error, f"lower batching.{size} or model.hidden_size")) is not None:
                raise memory from None
            raise
        finally:
            if trainer is not None:
                trainer.close()
            progress.close()


class Trainer:
    """One run on its way, from a fresh start or from its last good checkpoint."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        corpora: Corpora,
        device: torch.device,
        progress: Progress,
        start_s: float,
    ) -> None:
        self.config, self.run, self.corpora = config, run, corpora
        self.device, self.progress, self.start_s = device, progress, start_s
        self.rows, self.valid_rows = corpora.rows(config.batching.max_length)
        torch.manual_seed(config.seed)
        self.model = build_model(config, corpora.tokenizer.vocab_size)
        self.model.to(device)
        optimizer = config.optimizer
        self.optimizer = build_optimizer(
            self.model,
            name=optimizer.name,
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        weight_of = config.training.loss_weights.model_dump()
        self.loss_weights = {objective: weight_of[objective] for objective in self.model.objectives}
        self.saves = Saves(run, self.model, self.optimizer, device, corpora, config)
        restored = self.saves.restore(progress.note)
        self.state, lengths, self.begun_in = restored or self._begin()
        self.tracker = Tracker(run.path, lengths, progress.note)
        self.pad_id = corpora.tokenizer.pad_id
        sampler, accumulate = epoch_sampler(config, self.rows), config.training.accumulate
        self.feed = Feed(self.rows, sampler, self.pad_id, accumulate, self.state.epoch, self.state.next_batch)
        self.epoch_batches = self.feed.peek().epoch_batches
        self.feed.waited_s = 0.0  # what the start took is no wait
        self.window_start_s = self.saved_s = time.monotonic()
        self.figures: dict[str, float] = {}
        count = sum(parameter.numel() for parameter in self.model.parameters())
        progress.note(
            f"run {run.path}: {count:,} weights, vocabulary {corpora.tokenizer.vocab_size:,}, "
            f"{len(self.rows):,} sequences, {self.epoch_batches:,} batches an epoch, {device.type}, "
            f"{self.state.precision}"
        )
        if self._steps() < 2 * config.schedule.warmup_steps:
            progress.note(
                f"note: {self._steps()} steps in all, {config.schedule.warmup_steps} of warm-up; "
                "lower schedule.warmup_steps, or train longer"
            )

    def _begin(self) -> Restored:
        precision, why = choose_precision(self.config.training.precision, self.device, self.config.model.hidden_size)
        self.progress.note(f"precision {precision}: {why}")
        begun_in = {**environment(self.device), "precision": precision, "precision_because": why}
        self.run.write_environment(begun_in)
        return Restored(TrainingState(precision=precision), {}, begun_in)

    # ---- the loop

    def run_to_end(self, stopped_by: list[int], stop_at_step: int | None) -> TrainingResult:
        """Train until the configured end, a signal, or `stop_at_step`."""
        self.model.train()
        self.elapsed_before_s = self.state.elapsed_s
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
            stop = bool(stopped_by) or state.step == stop_at_step
            if improved or stop or self._save_due():
                self._save()
            if stopped_by:
                raise StoppedError(
                    stopped_by[0],
                    f"stopped at step {state.step} by {signal.Signals(stopped_by[0]).name}; the state is saved: "
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
            or (training.max_minutes is not None and self._elapsed_s() >= 60 * training.max_minutes)
            or (training.patience is not None and state.bad_validations >= training.patience)
        )

    def _elapsed_s(self) -> float:
        """Seconds of all the processes that worked on this run."""
        return self.elapsed_before_s + time.monotonic() - self.start_s

    def _progress(self) -> float:
        """Share of the training that is done: of its steps, or of its time budget if more of that is used up."""
        training = self.config.training
        share = self.state.step / self._steps()
        if training.max_minutes is not None:
            share = max(share, self._elapsed_s() / (60 * training.max_minutes))
        return min(1.0, share)

    def _steps(self) -> float:
        """Optimizer steps until the configured end, patience and time budget aside."""
        training = self.config.training
        steps_an_epoch = -(-self.epoch_batches // training.accumulate)
        return min(training.max_epochs * steps_an_epoch, training.max_steps or math.inf)

    def _step(self) -> None:
        """One optimizer step. Nats are summed over all its batches and divided once by the number of events."""
        state, optimizer, schedule = self.state, self.config.optimizer, self.config.schedule
        group = self.feed.take()
        assert (group.epoch, group.end) == (state.epoch, state.next_batch + len(group.batches))
        batches = group.batches
        counted = [count_events(batch.lengths) for batch in batches]
        events = {objective: sum(part[objective] for part in counted) for objective in self.loss_weights}
        rate = learning_rate(
            state.step,
            self._progress(),
            lr=optimizer.lr,
            name=schedule.name,
            warmup_steps=schedule.warmup_steps,
            final_fraction=schedule.final_fraction,
        )
        set_learning_rate(self.optimizer, rate)
        nats = dict.fromkeys(self.loss_weights, 0.0)
        weights = {name: weight / max(1, events[name]) for name, weight in self.loss_weights.items()}
        for batch in batches:
            with autocast(state.precision, self.device):
                losses = self.model.loss(batch.tokens.to(self.device), batch.lengths, weights)
            losses.total.backward()
            for objective, part in losses.parts.items():
                nats[objective] += float(part.nats)
        norm = clip_gradient(self.model.parameters(), optimizer.clip_grad_norm)
        if not math.isfinite(norm) or not all(map(math.isfinite, nats.values())):
            raise DivergedError(
                f"step {state.step + 1}: the loss or its gradient is not finite (learning rate {rate:g}, gradient norm "
                f"{norm:g}); try a lower optimizer.lr, a longer schedule.warmup_steps or a smaller "
                "optimizer.clip_grad_norm; the weights saved last are sound"
            )
        step(self.optimizer)
        self.last_norm, self.last_rate = norm, rate
        state.window.add(batches, nats, events)
        state.step += 1
        state.next_batch = group.end
        if group.ends_epoch:
            state.epoch, state.next_batch = state.epoch + 1, 0
            if not self._ended():
                self.epoch_batches = self.feed.peek().epoch_batches

    # ---- what is reported

    def _log_window(self) -> None:
        """A row of training metrics over the steps since the last one."""
        now_s = time.monotonic()
        elapsed_s = now_s - self.window_start_s
        self.figures = self.state.window.figures(
            self.loss_weights, self.last_rate, self.last_norm, elapsed_s, self.feed.waited_s
        )
        self.tracker.log(self.state.step, self._epoch(), self.figures)
        self.state.window, self.window_start_s, self.feed.waited_s = Window(), now_s, 0.0

    def _epoch(self) -> float:
        return self.state.epoch + self.state.next_batch / self.epoch_batches

    def _validation_due(self) -> bool:
        every = self.config.validation.every_steps
        return self.state.next_batch == 0 if every is None else self.state.step % every == 0

    def _validate(self) -> bool:
        """Validate, let the model write, and log both; True where the loss is the best so far."""
        started_s = time.monotonic()
        state, values, improved = self.state, {}, False
        state.validated_step = state.step
        self.model.eval()
        if self.valid_rows is not None:
            batches = sorted_batches(self.valid_rows, VALIDATION_TOKENS, self.pad_id)
            with autocast(state.precision, self.device):
                result = evaluate(self.model, batches)
            values = validation_figures(result, self.loss_weights)
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
            self.progress.note(f"step {state.step}: validation {in_words(values)}{' (best)' if improved else ''}")
        self.tracker.log(state.step, self._epoch(), {**values, "samples": self._samples()})
        if self.config.logging.histograms:
            self.tracker.histograms(state.step, self.model)
        self.model.train()
        self.window_start_s += time.monotonic() - started_s  # not part of the training's tokens per second
        return improved

    def _samples(self) -> list[dict[str, str]]:
        """What the model goes on with after the sample prompts, greedily."""
        prompts = self.config.logging.sample_prompts
        limit = self.config.generation.max_tokens
        written = generate(self.model, self.corpora.tokenizer, prompts, max_tokens=limit) if prompts else []
        return [{"prompt": each.prompt, "text": each.text} for each in written]

    # ---- saving and ending

    def _save_due(self) -> bool:
        settings = self.config.checkpoint
        minutes = (time.monotonic() - self.saved_s) / 60
        by_steps = settings.every_steps is not None and self.state.step % settings.every_steps == 0
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def _save(self) -> None:
        self.state.elapsed_s = self._elapsed_s()
        self.saves.save(self.state, self.tracker.lengths(), self.begun_in)
        self.saved_s = time.monotonic()

    def _finish(self) -> TrainingResult:
        """The last validation, the last row of hyperparameters, the last save."""
        if self.state.validated_step != self.state.step:
            self._validate()
        flat = flatten(self.config.model_dump())
        figures = self.state.best_figures or {key: v for key, v in self.figures.items() if key == "train/loss"}
        self.tracker.hyperparameters(flat, {f"hparam/{tag.replace('/', '_')}": v for tag, v in figures.items()})
        self.state.finished = True
        self._save()
        return self._result()

    def _result(self) -> TrainingResult:
        last: dict[str, float] = {
            tag: self.figures[tag] for tag in ("train/loss", "train/perplexity") if tag in self.figures
        }
        return TrainingResult(self.run.path, self.state.step, self.state.best_figures or last, self.state.best_step)

    def close(self) -> None:
        self.tracker.close()
        self.feed.close()
