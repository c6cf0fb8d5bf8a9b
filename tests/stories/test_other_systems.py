"""Systems and file systems that are not this one, as far as Linux can show: names that others lack are hidden from a
process, and a run stands on exFAT, which has no links, no rights, coarse times, and one name for `a` and `A`.

What only another system can show stands in `tests/README.md`.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lmtrain.runs.directory import create_run, find_resumable
from lmtrain.training.start import train
from tests.conftest import ROOT
from tests.oracle import digest

LONG = ("training.max_epochs=25", "checkpoint.every_steps=50")


def use(run, folder):
    """Commands that use a run, with what they print."""
    return [
        ["generate", run, "--prompt", "a b", "--json"],
        ["generate", run, "--temperature", "0.9", "--seed", "3"],
        ["evaluate", run, "--json"],
        ["score", run, "valid.txt", "--json"],
        ["export", run, "-o", folder, "--format", "safetensors"],
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def elsewhere(*commands, more=()):
    """Run lmtrain in a process that lacks what other systems lack; it runs the commands one after the other."""
    command = [sys.executable, str(ROOT / "tests/stories/other_system.py"), json.dumps(commands), *more]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as the tests' own process has
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | one_thread)


def test_a_process_without_what_other_systems_lack_comes_to_the_same_bits(corpus, shell):
    assert shell("train", "config.yaml", *LONG, "--run-dir", "here").returncode == 0
    expected = "".join(shell(*command).stdout for command in use("here", "exported-here")[:-1])
    assert shell(*use("here", "exported-here")[-1]).returncode == 0

    train_there = ["train", "config.yaml", *LONG, "--run-dir", "there"]
    stopped = elsewhere(train_there, more=["interrupted"])
    assert stopped.returncode == 130, stopped.stderr
    assert "no locks on this file system (fcntl is unavailable)" in stopped.stderr
    assert json.loads((corpus / "there/last.json").read_text())["step"] < 150

    resumed = elsewhere([*train_there, "--resume"], *use("there", "exported-there"))
    assert resumed.returncode == 0, resumed.stderr
    assert digest(corpus / "there") == digest(corpus / "here")
    assert resumed.stdout.partition("Next: lmtrain generate there\n")[2] == expected
    assert files(corpus / "exported-there") == files(corpus / "exported-here")


@pytest.fixture
def exfat(tmp_path):
    """An empty exFAT file system."""
    if not (shutil.which("mkfs.exfat") and shutil.which("mount.exfat-fuse") and os.geteuid() == 0):
        pytest.skip("exFAT needs mkfs.exfat (exfatprogs), mount.exfat-fuse (exfat-fuse) and a user who may mount")
    image, folder = tmp_path / "image", tmp_path / "exfat"
    folder.mkdir()
    with open(image, "wb") as handle:
        handle.truncate(64 << 20)
    subprocess.run(["mkfs.exfat", image], check=True, capture_output=True)
    device = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    try:
        subprocess.run(["mount.exfat-fuse", device.stdout.strip(), folder], check=True, capture_output=True)
        try:
            yield folder
        finally:
            os.chdir("/")
            subprocess.run(["umount", "--lazy", folder], check=True)  # a token store may still be mapped
    finally:
        subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


def test_a_run_on_exfat_comes_to_the_same_bits(small, corpus, exfat, shell, monkeypatch):
    config, whole = small(), digest(train(small(), "whole").run)
    for name in ("train.txt", "valid.txt", "config.yaml"):
        shutil.copyfile(name, exfat / name)
    monkeypatch.chdir(exfat)
    train(config, stop_at_step=4)
    run = train(config, resume=True).run
    assert digest(run) == whole
    assert [shell(*command).returncode for command in use(run, "exported")] == [0] * 5
    assert shell("train", "config.yaml", "--run-dir", run).returncode == 2  # nothing is overwritten


def test_a_run_of_the_same_name_in_another_case_is_another_run(small, corpus):
    check_case(small(), has_one_case=(corpus / "CONFIG.YAML").exists())


def test_a_run_of_the_same_name_in_another_case_gets_a_number_where_case_does_not_count(small, exfat, monkeypatch):
    config = small()
    monkeypatch.chdir(exfat)
    check_case(config, has_one_case=True)


def check_case(config, has_one_case):
    lower, upper = config.model_copy(update={"name": "night"}), config.model_copy(update={"name": "Night"})
    assert create_run(lower, None).path.name == "night"
    begun = create_run(upper, None)
    assert begun.path.name == ("Night-2" if has_one_case else "Night")
    (begun.path / "config.yaml").touch()
    assert find_resumable(upper, None).path == begun.path
    assert create_run(upper, None).path.name == ("Night-3" if has_one_case else "Night-2")
