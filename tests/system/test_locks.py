"""Locks on files: one holder, who is named; nothing is written through a link, and a removed file is not held."""

import os
import subprocess
import sys

import pytest

from lmtrain.system.locks import hold_lock

HOLD = """
import sys
from pathlib import Path
from lmtrain.system.locks import hold_lock
with hold_lock(Path(sys.argv[1]), lambda holder: print(f"waiting for {holder}", flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(path):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def refuse(process):
    raise ConnectionRefusedError(process)


def test_the_holder_is_named_until_it_ends_however_it_ends(tmp_path):
    path = tmp_path / "lock"
    first = holder(path)
    assert first.stdout.readline() == "held\n"
    for _ in range(2):  # a first try leaves the file as it was
        with pytest.raises(ConnectionRefusedError, match=f"^{first.pid}$"), hold_lock(path, refuse):
            pass
    first.kill()
    first.wait()
    with hold_lock(path, refuse):
        assert path.read_text() == str(os.getpid())


def test_a_process_that_waits_reports_it_once_and_gets_the_lock_next(tmp_path):
    path = tmp_path / "lock"
    with hold_lock(path, refuse):
        second = holder(path)
        assert second.stdout.readline() == f"waiting for {os.getpid()}\n"
    assert second.stdout.readline() == "held\n"
    second.communicate("\n")


def test_a_file_that_was_removed_while_somebody_waited_is_not_held(tmp_path):
    path = tmp_path / "lock"
    with hold_lock(path, refuse):
        second = holder(path)
        second.stdout.readline()
        path.unlink()
    assert second.stdout.readline() == "held\n"
    with pytest.raises(ConnectionRefusedError, match=str(second.pid)), hold_lock(path, refuse):
        pass
    second.communicate("\n")


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / "lock").symlink_to("theirs")
    with pytest.raises(OSError, match="symbolic links"), hold_lock(tmp_path / "lock", refuse):
        pass
    assert (tmp_path / "theirs").read_text() == "mine"


def test_an_unreadable_holder_is_unknown(tmp_path):
    path = tmp_path / "lock"
    first = holder(path)
    first.stdout.readline()
    path.write_bytes(b"\xff")
    with pytest.raises(ConnectionRefusedError, match="unknown"), hold_lock(path, refuse):
        pass
    first.communicate("\n")
