"""The run directory: its layout, the lock on it, and what of it can be judged before torch is imported.

runs/NAME/
  config.yaml  environment.json  tokenizer.json  counts.safetensors  metrics.jsonl  events.out.tfevents...
  checkpoints/step-00000500/
  best.json  last.json
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmtrain.config import Config, dump_config, load_config
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, StorageError
from lmtrain.runs import checkpoint
from lmtrain.system.files import read_json, read_text, write_atomically
from lmtrain.system.locks import hold_lock

USED = ("model.safetensors", "state.json")  # what a trained model is made of


class RunDirectory:
    """Where the files of one run are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._config_and_tokenizer: tuple[Config, Tokenizer] | None = None

    def holds_run(self) -> bool:
        """Whether training was ever started here."""
        return (self.path / "config.yaml").exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that trains in this directory.

        Raises:
            StorageError: another process trains here.
        """

        def refuse(holder: str) -> None:
            raise StorageError(f"{self.path}: process {holder} trains here; wait for it, or name another")

        with hold_lock(self.path / ".lock", refuse):
            yield

    def write_start(self, config: Config, tokenizer: Tokenizer, environment: dict[str, Any]) -> None:
        """What a run has from its first moment on; the config comes last, since it makes the directory a run."""
        self.checkpoints.mkdir(exist_ok=True)
        write_atomically(self.path / "tokenizer.json", tokenizer.dumps().encode())
        self.write_environment(environment)
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        write_atomically(self.path / "config.yaml", dump_config(config).encode())

    def write_environment(self, environment: dict[str, Any]) -> None:
        text = json.dumps(environment, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path / "environment.json", text.encode(errors="backslashreplace"))

    def launch(self) -> str | None:
        """What torchrun called the processes that began this run; None where it was one alone, or nobody knows."""
        try:
            launch = read_json(self.path / "environment.json").get("launch")
        except ArtefactError:
            return None
        return launch if isinstance(launch, str) else None

    def point(self, name: str, content: dict[str, Any]) -> None:
        """Write `best` or `last`.json."""
        write_atomically(self.path / f"{name}.json", (json.dumps(content) + "\n").encode())

    def pointed(self, name: str) -> int | None:
        """The step that `best` or `last`.json names; None where there is no such file, or none that can be read."""
        try:
            step = read_json(self.path / f"{name}.json").get("step")
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

    def config_and_tokenizer(self) -> tuple[Config, Tokenizer]:
        """The run's configuration and tokenizer, after a look at all that takes neither torch nor much time.

        Raises:
            ArtefactError: a link, a broken config or tokenizer, or checkpoints none of which could be used.
        """
        if self._config_and_tokenizer is None:
            self.refuse_links()
            self._config_and_tokenizer = self._config(), self._tokenizer()
            problems: list[str] = []
            for step in self.candidates():
                try:
                    checkpoint.read_headers(self.checkpoints, step, USED)
                    break
                except checkpoint.NewerFormatError:
                    raise
                except ArtefactError as error:
                    problems.extend(error.faults)
            else:
                if problems:
                    raise unusable(problems)
        return self._config_and_tokenizer

    def candidates(self) -> list[int]:
        """The steps whose models may be used, the best first, then the last, then the others, newest first."""
        wanted = [step for step in (self.pointed("best"), self.pointed("last")) if step is not None]
        return list(dict.fromkeys([*wanted, *checkpoint.steps(self.checkpoints)]))

    def _tokenizer(self) -> Tokenizer:
        path = self.path / "tokenizer.json"
        return parse_tokenizer(read_text(path), str(path))

    def _config(self) -> Config:
        path = self.path / "config.yaml"
        try:
            return load_config(path, check_files=False)
        except ConfigError as error:
            raise ArtefactError(*error.faults) from None


def unusable(problems: list[str]) -> ArtefactError:
    """What to raise where every checkpoint has its problem."""
    mend = "no checkpoint can be used: take a copy of the run, or train a new one"
    return ArtefactError(*problems[:-1], f"{problems[-1]}; {mend}")


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


def refuse_read_only(path: str | Path) -> None:
    """Raises StorageError, before anything long is begun, where no run could be written."""
    standing = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not os.access(standing, os.W_OK):
        why = "read-only file system" if os.statvfs(standing).f_flag & os.ST_RDONLY else "permission denied"
        raise StorageError(f"{standing}: {why}; a run is written there: name another place")


def refuse_full(run_dir: str | Path) -> None:
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


def check_tokenizer(tokenizer: Tokenizer, state: dict[str, Any], name: str) -> None:
    """The weights belong to one vocabulary; raises ArtefactError where this is another."""
    if state.get("tokenizer") != tokenizer.fingerprint():
        raise ArtefactError(f"{name}: was trained with another tokenizer than the run's tokenizer.json")
