"""From a configuration to a training run: a new one, or one that is resumed."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from lmtrain.config import Config, load_config
from lmtrain.data.batches.loader import training_batches
from lmtrain.data.preparation import Corpora, prepare
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ConfigError, DataError, out_of_memory
from lmtrain.runs.directory import RunDirectory, create_run, find_resumable, refuse_nonempty, refuse_read_only
from lmtrain.runs.environment import device_of, environment
from lmtrain.runs.ngram_counts import check_countable
from lmtrain.system.device import scoped_settings
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
    """Train the model that a configuration describes, together with all processes that torchrun started for it.

    At the end it sets back what PyTorch keeps for the whole process: random state, threads, determinism. The command
    line also changes what can't be set back: see `lmtrain.system.variables`, and `keep_freed_memory` in
    `lmtrain.system.device`, which makes steps on the CPU faster.

    Args:
        config: a configuration, the path of its file, or a function that loads it.
        run_dir: the run directory, new or empty; default `runs_dir/name`, with -2, -3 ... if that is taken.
        resume: continue from the last good checkpoint, if there is one.
        stop_at_step: save and stop after this step, as if a signal had come.
        progress: shows what rank 0 does; the other processes show nothing.

    Raises:
        LmtrainError: a fault of config, data, run directory or machine; see `lmtrain.errors` for its kinds.
        StoppedError: a signal ended the training; its state is saved.
        PeerError: another process has a fault and reports it.
    """
    named = None if run_dir is None else str(run_dir)
    with join_processes() as processes:
        settings = processes.run_in_all(lambda: _settings(config, processes))
        differs = "{key} is {mine!r} here and {first!r} for rank 0"
        require_equal(processes, flatten_keys(settings.model_dump()), differs, ConfigError)
        shown = progress if progress is not None and processes.rank == 0 else NullProgress()
        try:
            return _train(settings, named, resume, stop_at_step, shown, processes)
        finally:
            shown.close()


def _settings(config: Config | str | Path | Callable[[], Config], processes: SingleProcess) -> Config:
    """The configuration; raises ConfigError if its batches can't be divided among these processes."""
    if isinstance(config, str | Path):
        config = load_config(config)
    settings = config() if callable(config) else config
    rows, count = settings.batching.batch_size, processes.world_size
    if settings.batching.carries_state and rows % count:
        more = -(-rows // count) * count
        raise ConfigError(f"batching.batch_size: {rows} columns can't be divided among {count} processes; use {more}")
    if rows < count and settings.batching.max_tokens is None:
        raise ConfigError(f"batching.batch_size: {rows} rows a step are too few for {count} processes")
    return settings


def _train(
    config: Config,
    named: str | None,
    resume: bool,
    stop_at_step: int | None,
    progress: Progress,
    processes: SingleProcess,
) -> TrainingResult:
    """Find or make the run directory, prepare the data, and train while the run is locked."""
    first = processes.rank == 0
    begun = processes.run_in_all(lambda: _find_begun(config, named, resume, progress, processes) if first else None)
    run, tokenizer = begun or (None, None)
    device = processes.run_in_all(lambda: device_of(config, progress.note, run))
    corpora = _prepare(config, progress, tokenizer, processes)  # before the run directory: its faults leave nothing
    processes.run_in_all(lambda: check_countable(config, len(corpora.train.tokens)))
    batches = processes.run_in_all(lambda: training_batches(config, corpora.train, corpora.tokenizer.eos_id))
    new = run is None and first
    if new:
        run = create_run(config, named)
    path = processes.broadcast(None if run is None else str(run.path))
    run = run or RunDirectory(Path(path))
    threads = config.training.num_threads or processes.threads()
    with (
        run.locked(progress.note) if first else nullcontext(),
        scoped_settings(device, threads),
        ExitStack() as opened,
    ):
        if new:
            refuse_nonempty(run.path)  # another process may have been quicker
            run.write_start(config, corpora.tokenizer, environment(device, processes.world_size, processes.launch))
        try:
            trainer = Trainer(config, run, corpora, batches, device, progress, processes, opened)
            if first and not new:
                run.write_config(config)  # some of its keys may change in a resume
            with noted_signals() as stopped_by:
                return trainer.run_to_end(stopped_by, stop_at_step)
        except (RuntimeError, MemoryError) as error:
            batching = config.batching
            size = f"batch_size (now {batching.batch_size})"
            if batching.max_tokens:
                size = f"max_tokens (now {batching.max_tokens})"
            if (memory := out_of_memory(error, f"lower batching.{size} or model.hidden_size")) is not None:
                raise memory from None
            raise


def _find_begun(
    config: Config, named: str | None, resume: bool, progress: Progress, processes: SingleProcess
) -> tuple[RunDirectory, Tokenizer] | None:
    """The run to resume and its tokenizer; None for a new run.

    torchrun starts processes anew after a fault, with the same command: then the run that they had begun is resumed.
    """
    run = find_resumable(config, named) if resume or processes.restarted else None
    if run is not None and not resume and run.launch() != processes.launch:
        run = None
    if run is None and named is not None:
        refuse_nonempty(named)
    if resume and run is None:
        progress.note("nothing to resume yet: starting afresh")
    refuse_read_only(run.path if run is not None else named or config.runs_dir)
    if run is None:
        return None
    begun_with, tokenizer = run.config_and_tokenizer()
    check_unchanged(begun_with, config)
    return run, tokenizer


def _prepare(config: Config, progress: Progress, tokenizer: Tokenizer | None, processes: SingleProcess) -> Corpora:
    """Prepare what the training reads. Rank 0 does it first; the others find the result in the cache, or prepare
    their own copy on another machine."""
    if not processes.under_torchrun:
        return prepare(config, progress.note, tokenizer, progress.reading)
    first = processes.rank == 0
    read = partial(prepare, config, progress.note, watch=progress.reading)
    made = processes.run_in_all(lambda: read(tokenizer) if first else None, rank_0_first=True)
    learnt = processes.broadcast(None if made is None else made.tokenizer.dumps())
    corpora = processes.run_in_all(lambda: made or read(parse_tokenizer(learnt)))
    require_equal(processes, corpora.hashes, "{key} holds another text here than for rank 0", DataError)
    return corpora
