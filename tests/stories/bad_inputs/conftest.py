"""How a row of a table is run and checked: in this process, where torch is loaded once."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lmtrain
from lmtrain.config import load_config
from lmtrain.training.start import train
from tests.conftest import SMALL, sentences
from tests.stories.bad_inputs.table import LONGEST_S, MOST_BYTES, forget_peak, listing, pattern, peak_bytes

Judge = Callable[..., None]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, ids, c.yaml and three runs: `run` of words and two directions, `one` of one, `ids`."""
    home = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(home)
    try:
        Path("train.txt").write_text(sentences(43, seed=1))
        Path("valid.txt").write_text("h g f e d c b a\n" * 9)
        Path("ids.txt").write_text("1 2 3\n8 4\n")
        Path("c.yaml").write_text(SMALL)
        steps = "training.max_steps=3"
        train(load_config("c.yaml", [steps]), "run")
        lmtrain.load("run").generate()  # what is imported late is there before anything is timed
        train(load_config("c.yaml", [steps, "model.bidirectional=false"]), "one")
        ids = ["tokenizer.kind=ids", "tokenizer.vocab_size=9", "logging.sample_prompts=[]"]
        train(load_config("c.yaml", [steps, *ids, "data.train=ids.txt", "data.valid=ids.txt"]), "ids")
    finally:
        os.chdir(before)
    return home


@pytest.fixture
def desk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the texts and c.yaml."""
    monkeypatch.chdir(tmp_path)
    for path in trained.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def home(trained: Path, desk: Path) -> Path:
    """The same, with a copy of the runs and the token stores."""
    shutil.copytree(trained, desk, dirs_exist_ok=True)
    return desk


class TooLongError(BaseException):
    """A command that does not come back; no `except Exception` takes it for a fault of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Break off what lasts longer."""

    def give_up(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture
def judge(shell: Callable[..., subprocess.CompletedProcess[str]]) -> Judge:
    """Run commands and hold all that comes of each against what should."""

    def run(commands: str | Iterable[str], said: str, code: int, left_out: tuple[str, ...] = ()) -> None:
        before = listing(left_out)
        for command in [commands] if isinstance(commands, str) else commands:
            forget_peak()
            held_bytes, started_s = peak_bytes(), time.process_time()
            with at_most(5 * LONGEST_S):
                done = shell(*shlex.split(command))
            took_s, grown_bytes = time.process_time() - started_s, peak_bytes() - held_bytes
            assert (done.returncode, done.stdout) == (code, ""), (command, done.stderr)
            assert re.fullmatch(pattern(said), done.stderr), (command, said, done.stderr)
            assert "Traceback" not in done.stderr
            assert took_s < LONGEST_S
            assert grown_bytes < MOST_BYTES
        assert listing(left_out) == before

    return run
