"""Where faults are tried: small corpora, real processes, and what a run comes to when nothing happens to it.

A process is forked from one that has imported torch already, which spares three seconds each; it has a life, signals,
limits and files of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lmtrain.check.run import inspect_run
from lmtrain.cli import main
from lmtrain.config import load_config
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import RunDirectory
from lmtrain.training.start import train
from tests.conftest import SMALL, sentences
from tests.oracle import digest

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line has it for several processes
CONTEXT = multiprocessing.get_context("forkserver")
# the last is what DistributedDataParallel imports where it is used first: seconds, in each process
CONTEXT.set_forkserver_preload(["tests.stories.faults.ground", "lmtrain.inference.trained_model", "torch._dynamo"])

SAVE_EVERY = 3  # steps
SETTINGS = (
    ["training.max_epochs=4"],
    ["training.max_epochs=8", "batching.mode=stream", "batching.bptt=9", "model.bidirectional=false",
     "averaging.name=ema", "model.ngram_embeddings=[2]", "model.ngram_counts=3"],
)  # fmt: skip
EVERY_RUN = ["logging.every_steps=1", f"checkpoint.every_steps={SAVE_EVERY}"]
PATIENCE_S = 120.0


class Started:
    """A command under way."""

    def __init__(self, process: BaseProcess, output: Path) -> None:
        self.process, self.output = process, output
        assert process.pid is not None
        self.pid = process.pid

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, as `subprocess` has it: -9 for SIGKILL."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, f"hangs: {self.said}"
        return self.process.exitcode

    @property
    def said(self) -> str:
        """What it has written to standard error so far."""
        return self.output.read_text(errors="replace")

    @contextmanager
    def traced(self, *options: str) -> Iterator[Path]:
        """Let strace watch a stopped process, and continue it. Yields the path of the log."""
        log = self.output.with_suffix(".trace")
        command = ["strace", "-f", "-qq", "-o", str(log), *options, "-p", str(self.pid)]
        if shutil.which("strace") is None:
            self.signal(signal.SIGKILL)
            pytest.skip("strace is not installed here")
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        status = Path(f"/proc/{self.pid}/status")
        until(lambda: tracer.poll() is not None or "TracerPid:\t0\n" not in status.read_text())
        if tracer.poll() is not None:
            self.signal(signal.SIGKILL)
            pytest.skip(f"strace can't be used here: {tracer.communicate()[1].strip()}")
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield log
        finally:
            self.wait()
            tracer.communicate(timeout=PATIENCE_S)


def _command(
    arguments: Sequence[str],
    directory: Path,
    output: Path,
    listeners: str,
    limits: dict[int, int],
    halted: bool,
    environment: dict[str, str],
) -> None:
    os.environ |= environment
    # as a terminal starts a command, whatever the process of the tests ignores (nohup: SIGHUP; a shell's &: SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.chdir(directory)
    output.touch()
    os.dup2(os.open("/dev/full" if listeners == "full" else output, os.O_WRONLY), 2)
    reader, writer = os.pipe()
    if listeners != "gone":
        writer = os.open("/dev/full" if listeners == "full" else os.devnull, os.O_WRONLY)
    os.dup2(writer, 1)
    os.close(reader)  # nobody will ever read
    if listeners == "closed":
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
    else:
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["lmtrain", *arguments]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, resource.RLIM_INFINITY))
    if halted:
        os.kill(os.getpid(), signal.SIGSTOP)
    code: Any = 1
    try:
        main()
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  # a bug of ours, which shows as one
        traceback.print_exc()
    os._exit(code)  # what multiprocessing would do at the end, flushing and joining, no command does


def _train_until(directory: Path, settings: Sequence[str], step: int) -> None:
    os.chdir(directory)
    train(load_config("config.yaml", settings), "run", stop_at_step=step)


class Ground:
    """One setting of a small run, in a directory of its own.

    Args:
        directory: empty.
        settings: overrides of the small configuration.
        wanted: the digest of the run that nothing happened to; None: it is run now.
    """

    def __init__(self, directory: Path, settings: Sequence[str], wanted: str | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.settings = directory, [*settings, *EVERY_RUN]
        self.run, self.outputs = directory / "run", 0
        (directory / "train.txt").write_text(sentences(43, seed=1))
        (directory / "valid.txt").write_text(sentences(9, seed=2))
        (directory / "config.yaml").write_text(SMALL)
        if wanted is None:
            assert self.train(run="whole").wait() == 0
            wanted = digest(directory / "whole")
        self.wanted = wanted

    def start(
        self,
        *arguments: str,
        listeners: str = "",
        limits: dict[int, int] | None = None,
        halted: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Started:
        """Begin a command.

        Args:
            listeners: full: standard output and error have no room; gone: output is a pipe that nobody reads; closed:
                there are no standard files.
            limits: `resource.RLIMIT_...`, from the start.
            halted: it stands still until SIGCONT.
        """
        self.outputs += 1
        output = self.directory / f"output-{self.outputs}"
        process = CONTEXT.Process(
            target=_command,
            args=(arguments, self.directory, output, listeners, limits or {}, halted, environment or {}),
            daemon=True,
        )
        process.start()
        started = Started(process, output)
        if halted:
            until(lambda: "State:\tT" in Path(f"/proc/{started.pid}/status").read_text())
        return started

    def together(
        self, count: int, *more: str, run: str | Path = "run", last: Ground | None = None, **environment: str
    ) -> list[Started]:
        """Begin to train in several processes, as torchrun would start them, or resume.

        Args:
            last: where the last of them reads and writes, in place of here.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
        given |= {"WORLD_SIZE": str(count)} | environment
        places = [*[self] * (count - 1), last or self]
        return [
            place.train(*more, run=run, environment={"RANK": str(rank)} | given) for rank, place in enumerate(places)
        ]

    def train(self, *more: str, run: str | Path = "run", **how: Any) -> Started:
        """Begin to train, or resume."""
        return self.start("train", "config.yaml", *self.settings, *more, "--run-dir", str(run), "--resume", **how)

    def under_way(self, started: Started, rows: int = 1) -> None:
        """Wait until a run has logged this number of rows, or has ended."""
        until(lambda: self.rows() >= rows or not started.process.is_alive())

    def rows(self) -> int:
        """How many rows of metrics there are."""
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def readable(self) -> int:
        """Assert that the run is whole and tidy; the number of steps that a resume would have to do again."""
        if not RunDirectory(self.run).holds_run():
            return 0
        list(inspect_run(RunDirectory(self.run)))
        steps = checkpoint.steps(self.run / "checkpoints")
        lines = (self.run / "metrics.jsonl").read_text().splitlines() if self.rows() else []
        logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        lost = max([0, *logged]) - max([0, *steps])
        assert lost <= SAVE_EVERY, (logged[-1:], steps)
        return max(0, lost)

    def tidy(self) -> None:
        """Assert that nothing half-written lies about."""
        assert [*self.run.glob("checkpoints/.step-*"), *self.run.glob(".*.new")] == []

    def ends_the_same(self) -> None:
        """Resume, and assert that the run comes to what it had come to if nothing had happened."""
        resumed = self.train()
        assert resumed.wait() == 0, resumed.said
        self.is_the_same()

    def is_the_same(self) -> None:
        """Assert oracle H: weights, optimizer, metric rows and samples."""
        assert digest(self.run) == self.wanted
        self.tidy()

    def stopped(self, step: int) -> None:
        """Train until a step, as if a signal had come then."""
        self.outputs += 1
        process = CONTEXT.Process(target=_train_until, args=(self.directory, self.settings, step))
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == 0


def until(condition: Callable[[], Any]) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.003)


class Field:
    """Grounds for one try after the other.

    Args:
        directory: they are made here, and removed with it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.made = directory, 0
        self.wanted: dict[int, str] = {}
        self.grounds: list[Ground] = []
        self.wanted_of_three: str | None = None  # the digest of a run of three processes that nothing happened to
        self.processes_before = 0

    def ground(self, chance: random.Random, setting: int | None = None) -> Ground:
        """A fresh one, of either setting or of this one."""
        self.made += 1
        number = chance.randrange(len(SETTINGS)) if setting is None else setting
        ground = Ground(self.directory / f"ground-{self.made}", SETTINGS[number], self.wanted.get(number))
        self.wanted[number] = ground.wanted
        self.grounds.append(ground)
        return ground

    @property
    def processes(self) -> int:
        """How many were started."""
        return self.processes_before + sum(ground.outputs for ground in self.grounds)

    def clear(self) -> None:
        """Remove what was tried."""
        self.processes_before = self.processes
        for ground in self.grounds:
            shutil.rmtree(ground.directory)
        self.grounds = []


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own in memory, mounted with these options; gives a function that changes them."""
    place.mkdir(exist_ok=True)

    def mount(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True, text=True)

    if (done := mount(options)).returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield lambda how: mount(f"remount,{how}").check_returncode()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
