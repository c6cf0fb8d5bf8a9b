"""Finds, creates and locks run directories, and checks the files of a run before torch is imported.

runs/NAME/
  config.yaml  environment.json  tokenizer.json  ngram_counts.safetensors  metrics.jsonl
  events.out.tfevents...  checkpoints/step-00000500/  best.json  last.json
"""

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lmtrain.config import Config, dump_config, load_config
from lmtrain.config.located_yaml import parse_yaml, read_config_text
from lmtrain.config.schema import RENAMED_KEYS
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, ConfigError, StorageError
from lmtrain.runs import checkpoint
from lmtrain.runs.checkpoint import INFERENCE_FILES
from lmtrain.system.console import Notify
from lmtrain.system.files import read_json, read_text, reason_of, write_atomically
from lmtrain.system.locks import MARKER, hold_lock
from lmtrain.system.version import __version__


class RunDirectory:
    """The directory of one run, and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._config_and_tokenizer: tuple[Config, Tokenizer] | None = None

    def holds_run(self) -> bool:
        """Tell whether a training run was ever started in this directory."""
        return (self.path / "config.yaml").exists()

    @contextmanager
    def locked(self, notify: Notify) -> Iterator[None]:
        """Be the only process that trains in this directory; raises StorageError if another one trains here."""

        def refuse(holder: str) -> None:
            raise StorageError(f"{self.path}: process {holder} trains here; wait for it, or name another")

        with ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(self.path / ".lock", refuse, notify))
            except OSError as error:
                raise StorageError(f"{self.path / '.lock'}: can't be locked: {reason_of(error)}") from None
            yield

    def write_start(self, config: Config, tokenizer: Tokenizer, environment: dict[str, Any]) -> None:
        """Write the files of a new run. The config comes last, since a directory with a config counts as a run."""
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
        """Return torchrun's name for the processes that began this run; None if there is none, or it is not known."""
        with suppress(ArtefactError):
            launch = read_json(self.path / "environment.json").get("launch")
            return launch if isinstance(launch, str) else None
        return None

    def write_pointer(self, name: str, content: dict[str, Any]) -> None:
        """Write `best.json` or `last.json`, which say the step of the best and of the last checkpoint."""
        write_atomically(self.path / f"{name}.json", (json.dumps(content) + "\n").encode())

    def read_pointer(self, name: str) -> int | None:
        """Return the step that `best.json` or `last.json` names; None if the file is missing or damaged."""
        with suppress(ArtefactError):
            step = read_json(self.path / f"{name}.json").get("step")
            return step if type(step) is int and step >= 0 else None
        return None

    def refuse_links(self) -> None:
        """Raise ArtefactError if there is anything in the directory but regular files and directories.

        What a link points to could be read or overwritten, and a FIFO or a device could block.
        """
        for folder, names, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*names, *files)):
                with suppress(FileNotFoundError):  # a training that still runs here removes files
                    mode = path.lstat().st_mode
                    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                        raise ArtefactError(f"{path}: not a regular file; a run directory holds nothing else")

    def config_and_tokenizer(self) -> tuple[Config, Tokenizer]:
        """Return the run's configuration and tokenizer, after every check that needs neither torch nor much time.

        Raises:
            ArtefactError: there is a link, the config or tokenizer is damaged, or no checkpoint can be used.
        """
        if self._config_and_tokenizer is None:
            self.refuse_links()
            refuse_old_version(self.path)
            try:
                config = load_config(self.path / "config.yaml", check_files=False)
            except ConfigError as error:
                raise ArtefactError(*error.faults) from None
            tokenizer_file = self.path / "tokenizer.json"
            self._config_and_tokenizer = config, parse_tokenizer(read_text(tokenizer_file), str(tokenizer_file))
            checkpoint.load_first_whole(
                self.candidates(), lambda step: checkpoint.read_headers(self.checkpoints, step, INFERENCE_FILES)
            )
        return self._config_and_tokenizer

    def candidates(self) -> list[int]:
        """List the steps whose weights inference may load: the best, then the last, then the others, newest first."""
        pointed = [step for step in (self.read_pointer("best"), self.read_pointer("last")) if step is not None]
        return list(dict.fromkeys([*pointed, *checkpoint.steps(self.checkpoints)]))


def refuse_old_version(run: Path) -> None:
    """Raise ArtefactError if environment.json names lmtrain 0.1 or, if it names none, config.yaml has old keys."""
    made_by: Any = None
    with suppress(ArtefactError):
        made_by = read_json(run / "environment.json").get("lmtrain")
    if not isinstance(made_by, str):
        with suppress(ConfigError):
            places = parse_yaml(read_config_text(str(run / "config.yaml")), "").places
            made_by = next(("0.1.0" for old_key in RENAMED_KEYS if tuple(old_key.split(".")) in places), None)
    if str(made_by).startswith("0.1."):
        old, new = f"lmtrain {made_by[:20]}", f"lmtrain {__version__}"
        raise ArtefactError(
            f"{run}: was made by {old}; {new} does not read its runs: use {old} for it, or train it anew"
        )


def create_run(config: Config, run_dir: str | None) -> RunDirectory:
    """Create a new run directory: `run_dir`, or `runs_dir/name` with -2, -3 ... if that name is taken.

    Raises:
        ConfigError: `run_dir` is not empty.
    """
    if run_dir is not None:
        refuse_nonempty(run_dir)
        path = Path(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        return RunDirectory(path)
    runs = Path(config.runs_dir)
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):  # another process was quicker: try the next number
            path = _numbered(config, max(_numbers(config), default=0) + 1)
            path.mkdir()
            return RunDirectory(path)


def refuse_read_only(path: str | Path) -> None:
    """Raise StorageError if no run can be written at this path; call it before anything that takes long."""
    existing = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        read_only = sys.platform != "win32" and os.statvfs(existing).f_flag & os.ST_RDONLY
        why = "read-only file system" if read_only else "permission denied"
        raise StorageError(f"{existing}: {why}: the run can't be written there; name another directory")


def refuse_nonempty(run_dir: str | Path) -> None:
    """Raise ConfigError if the directory named for a new run is not empty, since a run overwrites nothing."""
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or not _is_unused(path)):
        remedy = "continue the run with --resume, or name another" if RunDirectory(path).holds_run() else "name another"
        raise ConfigError(f"--run-dir {run_dir}: not empty; nothing is overwritten: {remedy}")


def _is_unused(path: Path) -> bool:
    """Tell whether a directory is empty, or holds only what a run has written before its config."""
    early_files = {".lock", f".lock{MARKER}", "checkpoints", "tokenizer.json", "environment.json"}
    names = {entry.name for entry in path.iterdir() if not (entry.name.startswith(".") and entry.suffix == ".new")}
    return names <= early_files and not list(path.glob("checkpoints/*")) and (not names or ".lock" in names)


def find_resumable(config: Config, run_dir: str | None) -> RunDirectory | None:
    """Find the run that `--resume` continues: `run_dir`, or the last of `runs_dir/name`, -2, -3 ...; or else None."""
    if run_dir is not None:
        run = RunDirectory(Path(run_dir))
        return run if run.holds_run() else None
    runs = (RunDirectory(_numbered(config, number)) for number in sorted(_numbers(config), reverse=True))
    return next((run for run in runs if run.holds_run()), None)


def _numbers(config: Config) -> list[int]:
    """List the numbers of the existing directories `name`, `name-2`, `name-3` ...; `name` itself is number 1."""
    pattern = re.compile(re.escape(config.name) + "(?:-([1-9][0-9]{0,8}))?", re.IGNORECASE)
    found = (pattern.fullmatch(path.name) for path in Path(config.runs_dir).glob("*"))
    numbers = {int(match[1] or 1) for match in found if match}
    # in another case it is the same directory on Windows and macOS, and another one elsewhere
    return [number for number in numbers if _numbered(config, number).exists()]


def _numbered(config: Config, number: int) -> Path:
    return Path(config.runs_dir) / (config.name if number == 1 else f"{config.name}-{number}")


def find_run(run: str | Path | None) -> RunDirectory:
    """Find the run with this path; without a path, the newest run under `runs/` that has a checkpoint.

    Raises:
        ConfigError: no run is named, and there is none under `runs/`.
        ArtefactError: the path is not that of a run.
    """
    if run is None:
        saved = [path for path in Path("runs").glob("*/last.json") if path.is_file()]
        if not saved:
            raise ConfigError(
                "no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"
            )
        return RunDirectory(max(saved, key=lambda path: path.stat().st_mtime_ns).parent)
    named = RunDirectory(Path(run))
    if not named.path.is_dir():
        raise ArtefactError(f"{run}: no such run directory")
    if not named.holds_run():
        raise ArtefactError(f"{run}: not a run directory (no config.yaml in it)")
    return named
