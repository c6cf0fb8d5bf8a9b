"""Single files: what differs between systems when they are renamed and written to the disk itself."""

import atexit
import errno
import os
import shutil
import sys

import pytest

from lmtrain.system.files import move, scratch_directory, sync_directory, sync_file, write_atomically


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """A new file and an old one, which another program has open for the first two tries to rename the new one."""
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    tries, replace = [], os.replace

    def refuse(source, target):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    return tmp_path


def test_windows_tries_again_to_rename_what_another_program_has_open(scanned, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    move(scanned / "new", scanned / "old")
    assert (scanned / "old").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="of other systems")
def test_elsewhere_a_permission_that_is_missing_is_said_at_once(scanned):
    with pytest.raises(PermissionError):
        move(scanned / "new", scanned / "old")


def test_macos_writes_through_the_memory_of_the_drive(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    with open(tmp_path / "file", "wb") as handle:
        handle.write(b"text")
        sync_file(handle)
        assert (tmp_path / "file").read_bytes() == b"text"
    assert asked == [51]


@pytest.mark.skipif(sys.platform == "win32", reason="syncs no directories")
def test_a_file_system_that_syncs_no_directories_is_no_fault(tmp_path, monkeypatch):
    def answer(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    answer(errno.EINVAL)
    sync_directory(tmp_path)
    answer(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_directory(tmp_path)


def test_what_windows_keeps_of_a_scratch_directory_is_removed_when_the_process_ends(tmp_path, monkeypatch):
    at_end = []
    monkeypatch.setattr(atexit, "register", lambda remove, path, ignore_errors: at_end.append(path))
    with scratch_directory(tmp_path) as scratch:
        (scratch / "file").touch()
    assert not at_end
    assert not scratch.exists()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # the files are mapped into memory
    with scratch_directory(tmp_path) as scratch:
        (scratch / "file").touch()
    assert at_end == [scratch]


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path):
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "file", content)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]
