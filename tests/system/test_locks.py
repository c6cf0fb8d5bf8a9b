"""Locks on files: one holder, who is named; nothing is written through a link, and a removed file is not held.
Where a file system has no locks, a file stands for one, and and an error is not taken for a lock that is held."""

import errno
import os
import subprocess
import sys

import pytest

from lmtrain.system.locks import NO_LOCKS, hold_lock

HOLD = """
import sys
from pathlib import Path
from lmtrain.system.locks import hold_lock
if len(sys.argv) > 2:
    import fcntl
    def flock(descriptor, operation):
        raise OSError(int(sys.argv[2]), "as a network file system answers")
    fcntl.flock = flock
with hold_lock(Path(sys.argv[1]), lambda holder: print(f"waiting for {holder}", flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(path, *refusal):
    command = [sys.executable, "-c", HOLD, path, *map(str, refusal)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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
        assert int(path.read_text()) == os.getpid()


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


@pytest.fixture
def no_locks(monkeypatch):
    """Let the system answer each request for a lock with an error, as network file systems do."""

    def answer(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    return answer


@pytest.mark.parametrize("number", sorted(NO_LOCKS), ids=errno.errorcode.get)
def test_a_file_system_without_locks_gets_a_file_and_a_note(tmp_path, no_locks, number):
    no_locks(number)
    path, notes = tmp_path / "lock", []
    for _ in range(2):  # what the first one leaves does not count as held
        with hold_lock(path, refuse, notes.append):
            other = holder(path, number)
            assert other.stdout.readline().startswith(f"waiting for {os.getpid()} of ")
        assert other.stdout.readline() == "held\n"
        other.communicate("\n")
    assert len(notes) == 2
    assert f"no locks on this file system ({os.strerror(number).lower()})" in notes[0]


def test_a_holder_that_was_killed_keeps_nobody_out(tmp_path, no_locks):
    no_locks(errno.ENOSYS)
    path = tmp_path / "lock"
    first = holder(path, errno.ENOSYS)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ConnectionRefusedError, match=rf"{first.pid} of .*remove {path}\.held"), hold_lock(path, refuse):
        pass
    first.kill()
    first.wait()
    with hold_lock(path, refuse):
        pass
    path.with_name("lock.held").write_text(f"{os.getpid()}")  # the process was killed while it wrote
    with hold_lock(path, refuse):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_lock_that_fails_is_not_held_by_anybody(tmp_path, no_locks, number):
    no_locks(number)
    with pytest.raises(OSError, match=os.strerror(number)), hold_lock(tmp_path / "lock", refuse):
        pass
