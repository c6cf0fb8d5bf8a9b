"""From a configuration to a run that trains: a new one, or one that goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from lmtrain.config import Config, load_config
from lmtrain.data.batches.loader import training_batches
from lmtrain.data.preparation import Corpora, prepare
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ConfigError, DataError, out_of_memory
from lmtrain.runs.directory import RunDirectory, create_run, find_resumable, refuse_full, refuse_read_only
from lmtrain.runs.environment import environment
from lmtrain.runs.ngram_counts import refuse_large
from lmtrain.system.device import choose_device, keep_freed_memory
from lmtrain.system.processes import SingleProcess, join_processes, require_equal
from lmtrain.system.progress import NullProgress, Progress
from lmtrain.system.signals import noted_signals
from lmtrain.training.checkpointer import check_unchanged, flatten_keys
from lmtrain.training.trainer import Trainer, TrainingResult


def train(
    config: Config | str | Path | Callable[[], Config],
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    stop_at_step: int | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train the model that a configuration describes, with all other processes that torchrun started for it.

    Args:
        config: a configuration, the path of its file, or what loads it.
        run_dir: the run directory, new or empty; default `runs_dir/name`, with -2, -3 ... where that is taken.
        resume: go on from the last good checkpoint, where there is one.
        stop_at_step: save and stop after this step, as a signal would make it.
        progress: of rank 0; the others are quiet.

    Raises:
        LmtrainError: a fault of config, data, run directory or machine; see `lmtrain.errors` for its kinds.
        StoppedError: a signal ended it; its state is saved.
        PeerError: another process has a fault, and tells of it.
    """
    start_s = time.monotonic()
    named = None if run_dir is None else str(run_dir)
    with join_processes() as processes:
        settings = processes.agree(lambda: _settings(config, processes))
        require_equal(
            processes,
            flatten_keys(settings.model_dump()),
            "{key} is {mine!r} here and {first!r} for rank 0",
            ConfigError,
        )
        shown = progress if progress is not None and processes.rank == 0 else NullProgress()
        try:
            return _train(settings, named, resume, stop_at_step, shown, start_s, processes)
        finally:
            shown.close()


def _settings(config: Config | str | Path | Callable[[], Config], processes: SingleProcess) -> Config:
    """The configuration; raises ConfigError where it can't be shared out to these processes."""
    if isinstance(config, str | Path):
        config = load_config(config)
    settings = config() if callable(config) else config
    rows, count = settings.batching.batch_size, processes.world_size
    if settings.batching.carries_state and rows % count:
        more = -(-rows // count) * count
        raise ConfigError(f"batching.batch_size: {rows} columns can't be shared out to {count} processes; use {more}")
    if rows < count and settings.batching.max_tokens is None:
        raise ConfigError(f"batching.batch_size: {rows} rows a step are too few for {count} processes")
    return settings


def _train(
    config: Config,
    named: str | None,
    resume: bool,
    stop_at_step: int | None,
    progress: Progress,
    start_s: float,
    processes: SingleProcess,
) -> TrainingResult:
    first = processes.rank == 0
    begun = processes.agree(lambda: _begun(config, named, resume, progress, processes) if first else None)
    run, tokenizer = begun or (None, None)
    device = processes.agree(lambda: choose_device(config.training.device))
    keep_freed_memory()
    if (threads := config.training.num_threads or processes.threads()) is not None:
        torch.set_num_threads(threads)
    corpora = _prepared(config, progress, tokenizer, processes)  # before the run directory: its faults leave nothing
    processes.agree(lambda: refuse_large(config, corpora.train))
    reading = processes.agree(lambda: training_batches(config, corpora.train, corpora.tokenizer.eos_id))
    new = run is None and first
    if new:
        run = create_run(config, named)
    path = processes.share(None if run is None else str(run.path))
    run = run or RunDirectory(Path(path))
    with run.locked() if first else nullcontext():
        if new:
            refuse_full(run.path)  # another process may have been quicker
            run.write_start(config, corpora.tokenizer, environment(device, processes.world_size, processes.launch))
        trainer = None
        try:
            trainer = Trainer(config, run, corpora, reading, device, progress, start_s, processes)
            if first and not new:
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


def _begun(
    config: Config, named: str | None, resume: bool, progress: Progress, processes: SingleProcess
) -> tuple[RunDirectory, Tokenizer] | None:
    """The run to go on with, and its tokenizer; None for a new one.

    torchrun starts processes anew after a fault, with the command as it was: what they had begun then goes on.
    """
    run = find_resumable(config, named) if resume or processes.restarted else None
    if run is not None and not resume and run.launch() != processes.launch:
        run = None
    if run is None and named is not None:
        refuse_full(named)
    if resume and run is None:
        progress.note("nothing to resume yet: starting afresh")
    refuse_read_only(run.path if run is not None else named or config.runs_dir)
    if run is None:
        return None
    begun_with, tokenizer = run.config_and_tokenizer()
    check_unchanged(begun_with, config)
    return run, tokenizer


def _prepared(config: Config, progress: Progress, tokenizer: Tokenizer | None, processes: SingleProcess) -> Corpora:
    """What the training reads: made by rank 0; the others find it there, or make their own on another machine."""
    if not processes.together:
        return prepare(config, progress.note, tokenizer, progress.reading)
    first = processes.rank == 0
    read = partial(prepare, config, progress.note, watch=progress.reading)
    made = processes.agree(lambda: read(tokenizer) if first else None, rank_0_first=True)
    learnt = processes.share(None if made is None else made.tokenizer.dumps())
    corpora = processes.agree(lambda: made or read(parse_tokenizer(learnt)))
    require_equal(processes, corpora.hashes, "{key} holds another text here than for rank 0", DataError)
    return corpora
