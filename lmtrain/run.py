"""The run directory: its layout, the lock on it, and the trained model in it.

runs/NAME/
  config.yaml  environment.json  tokenizer.json  metrics.jsonl  events.out.tfevents...
  checkpoints/step-00000500/
  best.json  last.json
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmtrain import checkpoint
from lmtrain.config import Config, dump_config, load_config
from lmtrain.data import tokenizer as tokenizers
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ArtefactError, ConfigError, StorageError
from lmtrain.model.language_model import LanguageModel


class RunDirectory:
    """Where the files of one run are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def holds_run(self) -> bool:
        """Whether training was ever started here."""
        return (self.path / "config.yaml").exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone.

        Raises:
            StorageError: another process trains here.
        """
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
                raise StorageError(f"{self.path}: process {holder} trains here; wait for it, or name another") from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def write_start(self, config: Config, tokenizer: Tokenizer, environment: dict[str, Any]) -> None:
        """What a run has from its first moment on; the config comes last, since it makes the directory a run."""
        self.checkpoints.mkdir(exist_ok=True)
        checkpoint.write_atomically(self.path / "tokenizer.json", tokenizer.dumps().encode())
        self.write_environment(environment)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        checkpoint.write_atomically(self.path / "config.yaml", dump_config(config).encode())

    def write_environment(self, environment: dict[str, Any]) -> None:
        text = json.dumps(environment, indent=1, ensure_ascii=False) + "\n"
        checkpoint.write_atomically(self.path / "environment.json", text.encode(errors="backslashreplace"))

    def point(self, name: str, content: dict[str, Any]) -> None:
        """Write `best` or `last`.json."""
        checkpoint.write_atomically(self.path / f"{name}.json", (json.dumps(content) + "\n").encode())

    def pointed(self, name: str) -> int | None:
        """The step that `best` or `last`.json names; None where there is no such file, or none that can be read."""
        try:
            step = checkpoint.read_json(self.path / f"{name}.json").get("step")
        except ArtefactError:
            return None
        return step if type(step) is int and step >= 0 else None

    def refuse_links(self) -> None:
        """A run directory holds files and directories only.

        Raises:
            ArtefactError: a link (what it points to could be read or overwritten), a FIFO, a device.
        """
        for folder, names, files in os.walk(self.path):
            for name in (*names, *files):
                path = Path(folder, name)
                if not stat.S_ISDIR(path.lstat().st_mode) and not stat.S_ISREG(path.lstat().st_mode):
                    raise ArtefactError(f"{path}: not a regular file; a run directory holds nothing else")

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; raises ArtefactError."""
        path = self.path / "tokenizer.json"
        return tokenizers.loads(checkpoint.read_text(path), str(path))

    def config(self) -> Config:
        """The run's configuration; raises ArtefactError."""
        path = self.path / "config.yaml"
        try:
            return load_config(path, check_files=False)
        except ConfigError as error:
            raise ArtefactError(*error.faults) from None


def create_run(config: Config, run_dir: str | None) -> RunDirectory:
    """A new run directory: the one named, or `runs_dir/name` with -2, -3 ... where that is taken.

    Raises:
        ConfigError: the directory named has something in it.
    """
    if run_dir is not None:
        refuse_full(run_dir)
        path = Path(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        return RunDirectory(path)
    runs = Path(config.runs_dir)
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        number = max(_numbers(config), default=0) + 1
        with suppress(FileExistsError):  # another process was quicker
            path = _numbered(config, number)
            path.mkdir()
            return RunDirectory(path)


def refuse_full(run_dir: str) -> None:
    """Nothing is ever overwritten: raises ConfigError where a directory named for a new run has something in it."""
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or not _as_good_as_empty(path)):
        mend = "go on with --resume, or name another" if RunDirectory(path).holds_run() else "name another"
        raise ConfigError(f"--run-dir {run_dir}: not empty; nothing is overwritten: {mend}")


def _as_good_as_empty(path: Path) -> bool:
    """Nothing in it, or only what a run has that was killed before it had begun."""
    begun = {".lock", "checkpoints", "tokenizer.json", "environment.json"}
    names = {entry.name for entry in path.iterdir() if not (entry.name.startswith(".") and entry.suffix == ".new")}
    return names <= begun and not list(path.glob("checkpoints/*")) and (not names or ".lock" in names)


def find_resumable(config: Config, run_dir: str | None) -> RunDirectory | None:
    """The run that `--resume` goes on with: the one named, or the last of `runs_dir/name`, -2, -3 ...; or None."""
    if run_dir is not None:
        run = RunDirectory(Path(run_dir))
        return run if run.holds_run() else None
    found = (RunDirectory(_numbered(config, number)) for number in sorted(_numbers(config), reverse=True))
    return next((run for run in found if run.holds_run()), None)


def _numbers(config: Config) -> list[int]:
    """The numbers of the directories `name`, `name-2`, `name-3` ... that there are; `name` itself is 1."""
    names = [path.name for path in Path(config.runs_dir).glob("*")]
    suffixes = (name.removeprefix(f"{config.name}-") for name in names if name.startswith(f"{config.name}-"))
    numbers = [int(suffix) for suffix in suffixes if re.fullmatch("[1-9][0-9]{0,8}", suffix)]
    return [*numbers, 1] if config.name in names else numbers


def _numbered(config: Config, number: int) -> Path:
    return Path(config.runs_dir) / (config.name if number == 1 else f"{config.name}-{number}")


def find_run(run: str | Path | None, runs_dir: str = "runs") -> RunDirectory:
    """The run named, or the newest under `runs_dir` that has a checkpoint.

    Raises:
        ConfigError: none named and none to be found.
        ArtefactError: what is named is not a run.
    """
    if run is None:
        saved = [path for path in Path(runs_dir).glob("*/last.json") if path.is_file()]
        if not saved:
            raise ConfigError(
                f"no trained run under {runs_dir}/; train one (lmtrain train configs/quickstart.yaml) or name one"
            )
        return RunDirectory(max(saved, key=lambda path: path.stat().st_mtime_ns).parent)
    found = RunDirectory(Path(run))
    if not found.path.is_dir():
        raise ArtefactError(f"{run}: no such run directory")
    if not found.holds_run():
        raise ArtefactError(f"{run}: not a run directory (no config.yaml in it)")
    return found


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """The model that a configuration describes, with fresh weights."""
    model = config.model
    return LanguageModel(
        vocab_size,
        embedding_size=model.embedding_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        layer_sizes=model.layer_sizes,
        cell=model.cell,
        bidirectional=model.bidirectional,
        dropout=model.dropout,
        residual=model.residual,
        layer_norm=model.layer_norm,
        ngrams=model.ngrams,
        ngram_buckets=model.ngram_buckets,
        tie_weights=model.tie_weights,
        output=model.output,
        backend=model.backend,
        sampled_tokens=config.training.sampled_tokens,
        frequent_tokens=config.training.frequent_tokens,
        **config.regularization.model_dump(),
    )


def weights(model: LanguageModel) -> dict[str, Tensor]:
    """The model's weights by name; tied ones once."""
    return dict(model.named_parameters())


def check_weights(config: Config, vocab_size: int, tensors: dict[str, Tensor], name: str) -> None:
    """Hold saved weights against a configuration before any memory is taken for its model.

    Raises:
        ArtefactError: a tensor missing, unknown, of another shape or type, or not finite.
    """
    with torch.device("meta"):  # shapes without memory
        own = weights(build_model(config, vocab_size))
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ArtefactError(f"{name}: {'missing' if odd[0] in own else 'unknown'} tensor {odd[0]!r}")
    for key, parameter in own.items():
        saved = tensors[key]
        if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
            raise ArtefactError(
                f"{name}: tensor {key!r} is {_kind(saved)}, the run's config and tokenizer want {_kind(parameter)}"
            )
        if not bool(torch.isfinite(saved).all()):
            raise ArtefactError(f"{name}: tensor {key!r} holds values that are not finite")


@torch.no_grad()
def load_weights(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put saved weights, checked before, into a model."""
    for key, parameter in weights(model).items():
        parameter.copy_(tensors[key])


def check_tokenizer(tokenizer: Tokenizer, state: dict[str, Any], name: str) -> None:
    """The weights belong to one vocabulary; raises ArtefactError where this is another."""
    if state.get("tokenizer") != tokenizer.fingerprint():
        raise ArtefactError(f"{name}: was trained with another tokenizer than the run's tokenizer.json")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class Loaded(NamedTuple):
    """A trained model as it comes out of its run."""

    run: RunDirectory
    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    step: int


def load_run(run: RunDirectory, device: torch.device, notify: Callable[[str], None]) -> Loaded:
    """The run's best model, else its last one, in evaluation mode; a damaged checkpoint is passed over and named.

    Raises:
        ArtefactError: no checkpoint that is whole, or files that don't fit together.
    """
    run.refuse_links()
    config, tokenizer = run.config(), run.tokenizer()
    wanted = [step for step in (run.pointed("best"), run.pointed("last")) if step is not None]
    candidates = list(dict.fromkeys([*wanted, *checkpoint.steps(run.checkpoints)]))
    if not candidates:
        raise ArtefactError(f"{run.path}: no checkpoint yet; train it further with --resume")
    problems: list[str] = []
    for step in candidates:
        name = str(checkpoint.home_of(run.checkpoints, step) / "model.safetensors")
        try:
            saved = checkpoint.load(run.checkpoints, step, ("model.safetensors", "state.json"))
            check_weights(config, tokenizer.vocab_size, saved.model, name)
            check_tokenizer(tokenizer, saved.state, name)
        except ArtefactError as error:
            problems.extend(error.faults)
            continue
        for problem in problems:
            notify(f"passed over: {problem}")
        model = build_model(config, tokenizer.vocab_size)
        load_weights(model, saved.model)
        return Loaded(run, config, tokenizer, model.to(device).eval(), step)
    raise ArtefactError(*problems)
