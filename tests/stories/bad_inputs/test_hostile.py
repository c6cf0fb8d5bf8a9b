"""Every command refuses a hostile run directory at once, in one line; nothing is executed and nothing is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from lmtrain.config import load_config
from lmtrain.runs import checkpoint
from lmtrain.training.start import train
from tests.conftest import SMALL, sentences

PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch hacked\x85R."
PANIC = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}  # fmt: skip
COMMANDS = [
    ["generate", "run"],
    ["evaluate", "run", "valid.txt"],
    ["score", "run", "valid.txt"],
    ["fill", "run", "a ____ b"],
    ["embed", "run", "valid.txt", "-o", "out.npz"],
    ["export", "run", "-o", "out"],
    ["check", "run"],
    ["train", "config.yaml", "--run-dir", "run", "--resume"],
]
# prints, after the lines of the command, whether torch was imported and the peak of memory in MB
DRIVER = """
import re, sys
from lmtrain.cli import _run
code = _run()
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print("torch" in sys.modules, int(peak) // 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a directory with texts, a configuration and a run."""
    home = tmp_path_factory.mktemp("trained")
    (home / "train.txt").write_text(sentences(43, seed=1))
    (home / "valid.txt").write_text(sentences(9, seed=2))
    (home / "config.yaml").write_text(SMALL)
    before = os.getcwd()
    os.chdir(home)
    try:
        train(load_config("config.yaml"), "run", stop_at_step=3)
    finally:
        os.chdir(before)
    return home


def weights_of(run):
    return run / "checkpoints" / "step-00000003" / "model.safetensors"


def sealed(run, **changes):
    """Write a manifest that fits the files that are there now."""
    home = weights_of(run).parent
    files = {
        name: {"bytes": (home / name).stat().st_size, "sha256": _hash(home / name)}
        for name in checkpoint.FILES
        if not (home / name).is_symlink()
    }
    manifest = {"format": 1, "step": 3, "files": files} | changes
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (home / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 24 else "0" * 64


def pickle(run):
    weights_of(run).write_bytes(PICKLE)
    sealed(run)


def oversized(run):
    weights_of(run).write_bytes((1 << 62).to_bytes(8, "little") + weights_of(run).read_bytes()[8:])
    sealed(run)


def nested(run):
    header = b"[" * 100_000
    weights_of(run).write_bytes(len(header).to_bytes(8, "little") + header)
    sealed(run)


def outward(run):
    entry = {"bytes": 1, "sha256": "0"}
    sealed(run, files={"../../../config.yaml": entry, "/etc/passwd": entry, "state.json": entry})


def link(run):
    weights_of(run).unlink()
    weights_of(run).symlink_to("/etc/passwd")


def linked_directory(run):
    (run / "checkpoints").rename(run / "aside")
    (run / "checkpoints").symlink_to("aside")


def fifo(run):
    weights_of(run).unlink()
    os.mkfifo(weights_of(run))


def panicking(run):
    (run / "tokenizer.json").write_text(json.dumps({"format": 1, "kind": "file", "tokenizer": PANIC}))


def bomb(run):
    lines = ["a0: &a0 {x: 1}"] + [f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}" for k in range(1, 40)]
    (run / "config.yaml").write_text("\n".join(lines) + "\n")


def endless_tokenizer(run):
    os.truncate(run / "tokenizer.json", 50 << 30)


def endless_state(run):
    os.truncate(weights_of(run).with_name("state.json"), 50 << 30)


DAMAGES = [
    pickle, oversized, nested, outward, link, linked_directory, fifo, panicking, bomb, endless_tokenizer, endless_state,
]  # fmt: skip


def listing(home):
    """Return the type, size and time of change of every file."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in home.rglob("*")
    }


@pytest.mark.parametrize("number", range(len(DAMAGES)), ids=lambda number: DAMAGES[number].__name__)
def test_a_hostile_run_is_refused(trained, tmp_path, number):
    """Each damage is tried with one command; test_artefacts.py tries all commands, in this process."""
    check_refused(trained, tmp_path, DAMAGES[number], [COMMANDS[number % 8]])


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_hostile_run_is_refused_by_every_command(trained, tmp_path, damage):
    check_refused(trained, tmp_path, damage, COMMANDS)


def check_refused(trained, tmp_path, damage, commands):
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    damage(home / "run")
    before = listing(home)
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, *command], cwd=home, capture_output=True, text=True, timeout=60
        )
        lines, (torch, peak_mb) = done.stderr.splitlines()[:-1], done.stderr.splitlines()[-1].split()
        assert (done.returncode, done.stdout) == (4, ""), (command, done.stderr)
        if damage is not bomb:  # which has as many faults as lines
            assert len(lines) == 1, (command, lines)
        assert torch == "False", command
        assert int(peak_mb) < 200, command
        assert listing(home) == before, command


def test_weights_of_another_size_are_refused_before_they_are_read(trained, tmp_path):
    """The file claims 50 GB; it is sparse, so that they take no disk."""
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    header = json.dumps({"embedding.weight": {"dtype": "F32", "shape": [12 << 30], "data_offsets": [0, 48 << 30]}})
    weights_of(home / "run").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(weights_of(home / "run"), 8 + len(header) + (48 << 30))
    sealed(home / "run")
    for command in COMMANDS[-1:]:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, *command], cwd=home, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 4, (command, done.stderr)
        assert int(done.stderr.split()[-1]) < 600, command  # torch itself takes 300
        assert "tensor" in done.stderr
