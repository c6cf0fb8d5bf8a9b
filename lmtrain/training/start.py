"""From a configuration to a run that trains: a new one, or one that goes on."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from lmtrain.config import Config, load_config
from lmtrain.data.feeding import training_reading
from lmtrain.data.preparation import prepare
from lmtrain.errors import out_of_memory
from lmtrain.progress import Progress, Quiet
from lmtrain.run import create_run, find_resumable, refuse_full, refuse_read_only
from lmtrain.runtime import choose_device, environment, keep_freed_memory, noted_signals
from lmtrain.training.resuming import check_unchanged
from lmtrain.training.trainer import Trainer, TrainingResult


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
    tokenizer = None
    if run is not None:
        begun_with, tokenizer = run.judged()
        check_unchanged(begun_with, config)
    refuse_read_only(run.path if run is not None else named or config.runs_dir)
    device = choose_device(config.training.device)
    keep_freed_memory()
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    # before the run directory: its faults leave nothing behind
    corpora = prepare(config, progress.note, tokenizer, progress.reading)
    reading = training_reading(config, corpora.train, corpora.tokenizer.eos_id)
    new = run is None
    run = run or create_run(config, named)
    with run.locked():
        if new:
            refuse_full(run.path)  # another process may have been quicker
            run.write_start(config, corpora.tokenizer, environment(device))
        trainer = None
        try:
            trainer = Trainer(config, run, corpora, reading, device, progress, start_s)
            if not new:
                run.write_config(config)  # with what may change in a resume
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
