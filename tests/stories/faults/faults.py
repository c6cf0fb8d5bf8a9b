"""The faults a run has to survive, each as a function that tries it once on a fresh ground.

`turn` counts the tries of a fault, for those that go through places one after the other. A function gives the number
of steps that were lost, and raises AssertionError where the run did not come through.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lmtrain.config import load_config
from lmtrain.errors import ArtefactError
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import RunDirectory
from lmtrain.training.state import open_checkpoint
from tests.conftest import NO_SPACE, READ_ONLY
from tests.oracle import digest
from tests.stories.faults.ground import SAVE_EVERY, Field, Ground, mounted, until

FLIPS = 50  # a try
KILLS = 4  # a try
TOGETHER_S = 30  # in which all processes have to end after one
CALLS = "mkdir,openat,write,fsync,rename,unlink,unlinkat,rmdir"


def killed(field: Field, chance: random.Random, turn: int) -> int:
    ground, lost = field.ground(chance), 0
    for _ in range(KILLS):
        before, started = ground.rows(), ground.train()
        if chance.random() < 0.8:  # else while it begins
            ground.under_way(started, before + 1)
        time.sleep(chance.random() * 0.3)
        started.signal(signal.SIGKILL)
        assert started.wait() in (-signal.SIGKILL, 0), started.said
        lost = max(lost, ground.readable())
    ground.ends_the_same()
    return lost


def calls_of_a_save(ground: Ground) -> list[tuple[str, int, str]]:
    """The system calls of a run's second save, in order: name, its number among those of that name, the line."""
    started = ground.train("training.max_steps=7", halted=True)
    with started.traced("-y", "-e", f"trace={CALLS}") as log:
        pass
    assert started.wait() == 0, started.said
    counts: dict[str, int] = {}
    found = []
    inside = False
    for line in log.read_text().splitlines():
        number, _, call = line.partition(" ")
        match = re.match(r"\s*([a-z]+)\(", call)
        if match is None or int(number) != started.pid:
            continue
        name = match.group(1)
        counts[name] = counts.get(name, 0) + 1
        inside = inside or (name == "mkdir" and f"step-{2 * SAVE_EVERY:08d}.new" in call)
        if inside:
            found.append((name, counts[name], call))
        if name == "mkdir" and f"step-{2 * SAVE_EVERY + 1:08d}.new" in call:
            break
    return found


def killed_at_a_call(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    calls = calls_of_a_save(ground)
    shutil.rmtree(ground.run)
    name, number, _ = calls[turn % len(calls)]
    started = ground.train(halted=True)
    with started.traced("-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"):
        pass
    assert started.wait() == -signal.SIGKILL, (name, number, started.said)
    lost = ground.readable()
    ground.ends_the_same()
    return lost


def killed_at_a_removal(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    ground.settings.append("checkpoint.keep=1")
    started = ground.train(halted=True)
    name = ("unlinkat", "rmdir", "rename")[turn % 3]
    with started.traced("-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={chance.randint(8, 40)}"):
        pass
    assert started.wait() in (-signal.SIGKILL, 0), started.said
    run = RunDirectory(ground.run)
    if run.holds_run() and (steps := checkpoint.steps(run.checkpoints)):
        best = run.read_pointer("best")
        assert best is None or checkpoint.load(run.checkpoints, best)
        assert checkpoint.load(run.checkpoints, steps[0])
    lost = ground.readable()
    ground.ends_the_same()
    return lost


def signalled(number: int) -> Callable[[Field, random.Random, int], int]:
    """A signal to end, in mid-training."""

    def fault(field: Field, chance: random.Random, turn: int) -> int:
        ground = field.ground(chance)
        started = ground.train()
        ground.under_way(started, chance.randint(1, 12))
        started.signal(number)
        assert started.wait() == 128 + number, started.said
        last = started.said.splitlines()[-1]
        assert re.fullmatch(
            r"stopped at step \d+ by SIG\w+; the state is saved: lmtrain train .* --resume continues", last
        )
        lost = ground.readable()
        assert lost == 0
        ground.ends_the_same()
        return lost

    return fault


def signalled_again(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train(halted=True)
    with started.traced("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=50000:when=9+"):  # saves take a while
        ground.under_way(started, 2)
        started.signal(signal.SIGTERM)
        while started.process.is_alive():
            time.sleep(0.02)
            started.signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
    # one that comes when all is saved ends the process itself
    assert started.wait() in (128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT), started.said
    assert "Traceback" not in started.said
    lost = ground.readable()
    ground.ends_the_same()
    return lost


def paused(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train()
    ground.under_way(started)
    for _ in range(3):
        started.signal(signal.SIGSTOP)
        time.sleep(0.2 * chance.random())
        started.signal(signal.SIGCONT)
        time.sleep(0.05)
    assert started.wait() == 0, started.said
    ground.is_the_same()
    return 0


def _size(ground: Ground) -> int:
    """Bytes in blocks of the run that nothing happened to."""
    run = ground.directory / "whole"
    if not run.exists():
        assert ground.train(run="whole").wait() == 0
    return sum(4096 * -(-path.stat().st_size // 4096) for path in run.rglob("*"))


def full(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    size = chance.randrange(12 << 10, _size(ground))
    with mounted(ground.run, f"size={size}") as change:
        started = ground.train()
        code = started.wait()
        assert code == 5, (code, size, started.said)
        assert re.search(rf"{NO_SPACE}.*(bytes are needed, [\d,]+ are free|--resume continues)", started.said)
        assert len([line for line in started.said.splitlines() if NO_SPACE in line]) == 1
        ground.tidy()
        lost = ground.readable()
        change("size=64m")
        ground.ends_the_same()
    return lost


def full_for_others(field: Field, chance: random.Random, turn: int) -> int:
    """What other commands write: all of it or nothing."""
    ground = field.ground(chance, 0)
    ground.stopped(SAVE_EVERY)
    command, size = (
        (("embed", "run", "train.txt", "-o", "small/out.npz"), chance.randrange(4 << 10, 40 << 10)),
        (("export", "run", "--format", "safetensors", "-o", "small/out"), chance.randrange(4 << 10, 12 << 10)),
    )[turn % 2]
    with mounted(ground.directory / "small", f"size={size}"):
        started = ground.start(*command)
        assert started.wait() == 5, started.said
        assert re.fullmatch(rf"small/out\S*: can't be written: {NO_SPACE}.*\n", started.said), started.said
        assert [*(ground.directory / "small").iterdir()] == []
    ground.ends_the_same()
    return 0


def out_of_inodes(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    with mounted(ground.run, f"nr_inodes={chance.randint(3, 14)}") as change:
        started = ground.train()
        assert started.wait() == 5, started.said
        assert NO_SPACE in started.said
        ground.tidy()
        lost = ground.readable()
        change("nr_inodes=10000")
        ground.ends_the_same()
    return lost


def failing(name: str, *errors: str) -> Callable[[Field, random.Random, int], int]:
    """A system call that fails once, somewhere in a run."""

    def fault(field: Field, chance: random.Random, turn: int) -> int:
        ground = field.ground(chance)
        started = ground.train(halted=True)
        error = errors[turn % len(errors)]
        most = {"fsync": 60, "rename": 20, "write": 120}[name]
        when = chance.randint(1, most)
        with started.traced("-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={when}"):
            pass
        code = started.wait()
        wanted = {0} if error == "EINTR" else {0, 5} if name == "write" else {5}  # a lost line of progress ends nothing
        assert code in wanted, (code, started.said)
        if code == 0:
            ground.is_the_same()
            return 0
        assert "Traceback" not in started.said
        ground.tidy()
        lost = ground.readable()
        ground.ends_the_same()
        return lost

    return fault


def no_large_files(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train(limits={resource.RLIMIT_FSIZE: chance.randint(100, 9000)})
    assert started.wait() == 5, started.said
    assert "Traceback" not in started.said
    lost = ground.readable()
    ground.ends_the_same()
    return lost


def read_only(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    with mounted(ground.run, "size=64m") as change:
        if turn % 2:
            ground.stopped(chance.randint(1, 12))
        change("ro")
        started = ground.train()
        assert started.wait() == 5, started.said
        assert READ_ONLY in started.said
        assert len(started.said.splitlines()) <= 2, started.said  # before anything long is begun
        lost = ground.readable()
        change("rw")
        ground.ends_the_same()
    return lost


def no_tensorboard(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train()
    until(lambda: [*ground.run.glob("events.*")] or not started.process.is_alive())
    started.signal(signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{started.pid}/status").read_text())
    (events,) = ground.run.glob("events.*")
    with started.traced("-P", str(events), "-e", "trace=write", "-e", "inject=write:error=ENOSPC"):
        pass
    assert started.wait() == 0, started.said
    assert started.said.count("warning: TensorBoard's file can't be written") == 1, started.said
    ground.is_the_same()
    return 0


def torn_row(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train()
    ground.under_way(started, chance.randint(1, 20))
    started.signal(signal.SIGKILL)
    started.wait()
    with open(ground.run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "train/loss": 9.9}\n{"step": 4, "tra')
    ground.ends_the_same()
    return ground.readable()


def _stopped(field: Field, chance: random.Random) -> tuple[Ground, Path, Path]:
    """A run with two checkpoints or more, and the newest and the one before it."""
    ground = field.ground(chance)
    ground.stopped(chance.randint(2 * SAVE_EVERY, 14))
    checkpoints = ground.run / "checkpoints"
    newest, before = [checkpoint.directory_of(checkpoints, step) for step in checkpoint.steps(checkpoints)[:2]]
    return ground, newest, before


def _falls_back(ground: Ground, newest: Path, before: Path) -> None:
    """A resume names the newest checkpoint and continues from the one before it, to the same end."""
    resumed = ground.train()
    assert resumed.wait() == 0, resumed.said
    assert re.search(f"^skipped: .*{newest.name}", resumed.said, re.MULTILINE), resumed.said
    assert f"resumed from step {int(before.name[5:])}\n" in resumed.said
    ground.is_the_same()


def _damaged(ground: Ground, home: Path) -> bool:
    """Whether a resume would pass this checkpoint over."""
    run = RunDirectory(ground.run)
    try:
        open_checkpoint(run, *run.config_and_tokenizer(), int(home.name[5:])).read_tensors({})
    except ArtefactError:
        return True
    return False


def flipped(field: Field, chance: random.Random, turn: int) -> int:
    ground, newest, before = _stopped(field, chance)
    files = sorted(newest.iterdir())
    for flip in range(FLIPS):
        victim = files[flip % len(files)]
        good = victim.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        victim.write_bytes(bad)
        assert _damaged(ground, newest), (victim.name, good, bad)
        if flip < FLIPS - 1:
            victim.write_bytes(good)
    _falls_back(ground, newest, before)
    return 0


def cut_short(field: Field, chance: random.Random, turn: int) -> int:
    ground, newest, before = _stopped(field, chance)
    for victim in sorted(newest.iterdir()):
        good = victim.read_bytes()
        for length in reversed(range(0, len(good), 4096)):
            os.truncate(victim, length)
            assert _damaged(ground, newest), (victim.name, length)
        victim.write_bytes(good)
    victim = chance.choice(sorted(newest.iterdir()))
    os.truncate(victim, chance.randrange(victim.stat().st_size))
    _falls_back(ground, newest, before)
    return 0


def foreign(field: Field, chance: random.Random, turn: int) -> int:
    ground, newest, _ = _stopped(field, chance)
    strange = newest.with_name("step-00000999")
    match turn % 4:
        case 0:
            strange.mkdir()
        case 1:
            shutil.copytree(newest, strange)  # of another step
        case 2:
            strange.write_text("a file")
        case _:
            saved = checkpoint.load(newest.parent, int(newest.name[5:]))
            weights = {name: torch.zeros(3, *tensor.shape) for name, tensor in saved.model.items()}
            checkpoint.save(newest.parent, saved._replace(step=999, model=weights))
    _falls_back(ground, strange, newest)
    return 0


def two_trainers(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    first = ground.train()
    ground.under_way(first)
    first.signal(signal.SIGSTOP)
    second = ground.train()
    assert second.wait() == 5, second.said
    assert f"process {first.pid} trains here" in second.said
    first.signal(signal.SIGCONT)
    assert first.wait() == 0, first.said
    ground.is_the_same()
    return 0


def diverging(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train(
        "optimizer.name=sgd", f"optimizer.lr=1e{chance.randint(20, 37)}", "optimizer.clip_grad_norm=null"
    )
    assert started.wait() == 6, started.said
    last = started.said.splitlines()[-1]
    assert re.search(r"^step \d+: .*not finite \(learning rate \d.*\); try a lower optimizer\.lr", last), last
    for step in checkpoint.steps(ground.run / "checkpoints"):
        saved = checkpoint.load(ground.run / "checkpoints", step)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.model.values())
    return 0


def out_of_memory(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    started = ground.train("model.hidden_size=1500", "training.max_steps=3", halted=True)
    used = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{started.pid}/status").read_text())[1]) << 10
    resource.prlimit(started.pid, resource.RLIMIT_AS, (used + (chance.randint(20, 200) << 20),) * 2)
    os.kill(started.pid, signal.SIGCONT)
    assert started.wait() == 7, started.said
    # on a busy machine 25 MiB may run out before there is a model, while threads are started that hash the text
    remedy = r"lower batching\.batch_size \(now 8\) or model\.hidden_size|the model or its batches are too large .*"
    assert re.search(f"^out of memory: ({remedy})$", started.said, re.MULTILINE), started.said
    assert "Traceback" not in started.said
    return 0


def changed_data(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    ground.stopped(chance.randint(1, 12))
    text = ground.directory / ("train.txt", "valid.txt")[turn % 2]
    good = text.read_bytes()
    text.write_bytes(good.replace(b"a", b"b", 1))
    started = ground.train()
    assert started.wait() == 3, started.said
    assert f"{text.name}: changed since the run was begun; put it back, or train a new run" in started.said
    text.write_bytes(good)
    ground.ends_the_same()
    return 0


def changed_config(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    ground.stopped(chance.randint(1, 12))
    started = ground.train("model.hidden_size=9", "seed=4")
    assert started.wait() == 2, started.said
    assert [line.split(":")[0] for line in started.said.splitlines()] == ["seed", "model.hidden_size"]
    further = ground.train("training.max_epochs=10")
    assert further.wait() == 0, further.said
    return 0


def changed_machine(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    ground.stopped(2 * SAVE_EVERY)
    if turn % 2:
        saved = checkpoint.load(ground.run / "checkpoints", 2 * SAVE_EVERY)
        saved.state["environment"]["torch"] = "0.4"
        checkpoint.save(ground.run / "checkpoints", saved)
    started = ground.train(*([] if turn % 2 else ["training.num_threads=2"]))
    assert started.wait() == 0, started.said
    what = f"torch is {torch.__version__}, was 0.4" if turn % 2 else "num_threads is 2, was 1"
    assert f"note: {what}: the result is no longer bit-identical to an uninterrupted run's\n" in started.said
    return 0


def clock_set_back(field: Field, chance: random.Random, turn: int) -> int:
    """The clock itself is the machine's; what a run sees of it are the times of its files."""
    ground = field.ground(chance)
    ground.stopped(chance.randint(2 * SAVE_EVERY, 14))
    tomorrow = time.time() + 24 * 3600
    for path in ground.run.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    ground.ends_the_same()
    steps = checkpoint.steps(ground.run / "checkpoints")
    best = RunDirectory(ground.run).read_pointer("best")
    keep = load_config(ground.directory / "config.yaml", check_files=False).checkpoint.keep
    assert set(steps) <= {*steps[:keep], best}
    return 0


def nobody_listens(field: Field, chance: random.Random, turn: int) -> int:
    for listeners in ("full", "gone", "closed"):
        ground = field.ground(chance)
        assert ground.train(listeners=listeners).wait() == 0
        ground.is_the_same()
    for listeners, code in (("gone", 0), ("closed", 0), ("full", 5)):
        quiet = ground.start("generate", "run", "--json", listeners=listeners)
        assert (quiet.wait(), quiet.said) == (code, ""), listeners
    return 0


def two_builders(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    cache = ground.directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    if turn % 2:  # over broken stores, too
        assert ground.train("training.max_steps=1", run="first").wait() == 0
        for store in cache.glob("*/tokens.bin"):
            store.write_bytes(b"")
    both = [ground.train(run=name) for name in ("run", "other")]
    assert [each.wait() for each in both] == [0, 0], [each.said for each in both]
    ground.is_the_same()
    ground.run = ground.directory / "other"
    ground.is_the_same()
    assert [*cache.glob(".building-*")] == []
    return 0


def killed_while_building(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance)
    cache = ground.directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    started = ground.train(halted=True)
    name, most = (("write", 12), ("fsync", 9), ("rename", 3), ("mkdir", 4))[turn % 4]
    inside = chance.randint(1, most)
    with started.traced("-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={inside}"):
        pass
    assert started.wait() == -signal.SIGKILL, (name, inside)
    ground.ends_the_same()
    assert [*cache.glob(".building-*")] == []
    return 0


def one_of_three_killed(field: Field, chance: random.Random, turn: int) -> int:
    ground = field.ground(chance, 0)
    if field.wanted_of_three is None:
        whole = ground.together(3, run="whole-of-three")
        assert [process.wait() for process in whole] == [0] * 3, [process.said for process in whole]
        field.wanted_of_three = digest(ground.directory / "whole-of-three")
    processes = ground.together(3)
    ground.under_way(processes[0], chance.randint(1, 12))
    time.sleep(chance.random() * 0.2)
    processes[chance.randrange(3)].signal(signal.SIGKILL)
    start_s = time.monotonic()
    codes = [process.wait() for process in processes]
    assert time.monotonic() - start_s < TOGETHER_S
    assert set(codes) <= {-signal.SIGKILL, 5, 0}, [process.said for process in processes]
    lost = ground.readable()
    resumed = ground.together(3)
    assert [process.wait() for process in resumed] == [0] * 3, [process.said for process in resumed]
    assert digest(ground.run) == field.wanted_of_three
    ground.tidy()
    return lost


class Fault(NamedTuple):
    """One row of the table."""

    number: str
    name: str
    times: int  # how often it is to be tried in full
    once: Callable[[Field, random.Random, int], int]


FAULTS = [
    Fault("1", f"SIGKILL at random moments, {KILLS} a try", 50, killed),
    Fault("2", "SIGKILL at each call of a save", 60, killed_at_a_call),
    Fault("3", "SIGTERM", 5, signalled(signal.SIGTERM)),
    Fault("4", "more signals in that save", 5, signalled_again),
    Fault("5", "Ctrl-C", 5, signalled(signal.SIGINT)),
    Fault("6", "SIGHUP", 5, signalled(signal.SIGHUP)),
    Fault("7", "SIGSTOP, SIGCONT", 5, paused),
    Fault("8", "disk full", 20, full),
    Fault("8b", "disk full, for embed and export", 6, full_for_others),
    Fault("9", "out of inodes", 10, out_of_inodes),
    Fault("10", "fsync fails", 10, failing("fsync", "EIO")),
    Fault("11", "rename fails", 10, failing("rename", "EIO", "EACCES")),
    Fault("12", "write: EINTR, EDQUOT, ENOSPC", 15, failing("write", "EINTR", "EDQUOT", "ENOSPC")),
    Fault("13", "limit on the size of files", 10, no_large_files),
    Fault("14", "read-only run directory", 4, read_only),
    Fault("15", "TensorBoard's file can't be written", 5, no_tensorboard),
    Fault("16", "torn row of metrics", 5, torn_row),
    Fault("17", f"bit flips in a checkpoint, {FLIPS} a try", 20, flipped),
    Fault("18", "checkpoint cut at each 4 KiB", 4, cut_short),
    Fault("19", "empty or foreign newer checkpoint", 8, foreign),
    Fault("20", "killed while checkpoints are removed", 20, killed_at_a_removal),
    Fault("21", "two trainers, one run directory", 4, two_trainers),
    Fault("22", "infinity in loss or gradient", 4, diverging),
    Fault("23", "out of memory", 6, out_of_memory),
    Fault("24", "training data changed", 4, changed_data),
    Fault("25", "config changed", 3, changed_config),
    Fault("26", "threads or torch changed", 4, changed_machine),
    Fault("27", "clock set back a day", 3, clock_set_back),
    Fault("28", "nobody listens", 4, nobody_listens),
    Fault("29", "two builders of a token store", 6, two_builders),
    Fault("30", "killed while a token store is built", 16, killed_while_building),
    Fault("31", "one of three processes killed", 20, one_of_three_killed),
]
