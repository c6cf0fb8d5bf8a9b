"""Digests of large files are remembered until anything about the file changes."""

import os
import time

import pytest

from lmtrain.data.store.token_store import open_store
from lmtrain.data.text import digests
from lmtrain.data.text.digests import Digests
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from tests.data.conftest import random_lines, store_files


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    monkeypatch.setattr(digests, "AT_REST_NS", 0)


def test_a_digest_is_remembered_until_anything_changes(tmp_path, monkeypatch, all_are_large):
    path, notes = tmp_path / "t.txt", tmp_path / "notes"
    path.write_text("ab\n")
    time.sleep(0.02)
    first = Digests(notes).sha256(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(Digests, "_compute", lambda *_: "computed again")
        assert Digests(notes).sha256(str(path)) == first
    before = path.stat()
    path.write_text("cd\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = Digests(notes).sha256(str(path))
    assert second != first
    time.sleep(0.02)
    Digests(notes).sha256(str(path))
    (note,) = notes.iterdir()
    note.write_bytes(note.read_bytes().replace(second.encode(), first.encode()))
    assert Digests(notes).sha256(str(path)) == second  # a note that is damaged is none


def test_a_digest_of_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    (tmp_path / "t.txt").write_text("ab\n")
    Digests(tmp_path / "notes").sha256(str(tmp_path / "t.txt"))
    assert not (tmp_path / "notes").exists()


def test_a_large_store_that_was_changed_is_built_again(tmp_path, monkeypatch, all_are_large):
    (tmp_path / "t.txt").write_text(random_lines(50))
    source = Source((str(tmp_path / "t.txt"),))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    whole, path = store_files(store), store.directory / "tokens.bin"
    time.sleep(0.02)
    assert not open_store(source, ByteTokenizer(), tmp_path / "cache").is_new
    before, data = path.stat(), bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    assert store.is_new
    assert store_files(store) == whole
