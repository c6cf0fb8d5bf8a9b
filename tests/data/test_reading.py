"""From files to texts: what is read, what is refused and where, in bounded memory."""

import gzip
import os
import resource
import threading

import pytest

from lmtrain.data.text import reading, unpacking
from lmtrain.data.text.source import Source
from lmtrain.errors import DataError


def texts(tmp_path, content, name="text.txt", **settings):
    path = tmp_path / name
    path.write_bytes(content)
    return list(Source((str(path),), **settings).texts())


def test_lines_lose_bom_and_carriage_return_and_are_normalised(tmp_path):
    content = "\ufeffone\r\ntwo\r\n\r\n  \nde\u0301ja\u0300 \u1112\u1161\u11ab\u1100\u1173\u11af\nlast".encode()
    assert texts(tmp_path, content) == ["one", "two", "déjà 한글", "last"]


def test_a_separator_of_another_kind_is_no_line_end(tmp_path):
    assert texts(tmp_path, "a\u2028b\x0bc\x85d\n".encode()) == ["a\u2028b\x0bc\x85d"]


def test_the_size_of_blocks_changes_no_text(tmp_path, monkeypatch):
    content = "".join(f"줄 {n} {'x' * (n % 37)}\n" for n in range(500))
    whole = texts(tmp_path, content.encode())
    monkeypatch.setattr(reading, "BLOCK_BYTES", 13)
    assert texts(tmp_path, content.encode()) == whole == content.splitlines()


def test_gzip_and_jsonl(tmp_path):
    lines = b'{"text": "a b"}\n\n{"text": "", "id": 3}\n{"id": 4, "text": "\\ud55c\\u0301"}\n'
    assert texts(tmp_path, gzip.compress(lines), "records.jsonl.gz") == ["a b", "한\u0301"]
    assert texts(tmp_path, b'{"body": "x"}', "records.txt", format="jsonl", field="body") == ["x"]


def test_globs_are_read_in_order_and_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = Source.of([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])
    assert list(source.texts()) == ["c", "a", "b"]
    with pytest.raises(DataError, match="no such file"):
        Source.of([str(tmp_path / "*.nothing")])


def test_a_fraction_is_held_out_by_content(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"line {n % 900}" for n in range(2000)]
    path.write_text("\n".join(lines))

    def part(name, fraction=0.2):
        return list(Source((str(path),), part=name, valid_fraction=fraction).texts())

    train, valid = part("train"), part("valid")
    assert sorted(train + valid) == sorted(lines)
    assert not set(train) & set(valid)
    assert 0.15 < len(valid) / 2000 < 0.25
    path.write_text("\n".join(reversed(lines)))
    assert sorted(part("valid")) == sorted(valid)  # whatever the order


@pytest.mark.parametrize(
    ("content", "name", "what"),
    [
        (b"fine\nbad \xff\n", "t.txt", r"t\.txt:2:5: not UTF-8 \(byte 0xff\)"),
        ("\ufeff가\n".encode() + b"\xe0", "t.txt", r"t\.txt:2:1: not UTF-8 \(byte 0xe0\)"),
        (b"fine\nno\0\n", "t.txt", r"t\.txt:2:3: a NUL"),
        (b"x" * (17 << 20), "t.txt", r"t\.txt:1: a line of more than 16 MiB"),
        (gzip.compress(b"line\n" * 1000, mtime=0)[:40], "t.gz", r"t\.gz: broken gzip"),
        (b"no gzip", "t.gz", r"t\.gz: broken gzip"),
        (b'{"text": "a"}\n{"text": ]\n', "t.jsonl", r"t\.jsonl:2:10: not JSON"),
        (b'{"text": "a"}\n{"txt": "a"}\n', "t.jsonl", r"t\.jsonl:2: no field 'text'.*it has 'txt'"),
        (b'{"text": 3}\n', "t.jsonl", r"t\.jsonl:1: not an object whose field 'text' is text"),
        (b"[1]\n", "t.jsonl", r"t\.jsonl:1: an array, not a record"),
        (b'{"text": "a\\u0000"}\n', "t.jsonl", r"t\.jsonl:1: a NUL"),
    ],
)
def test_a_fault_of_a_file_is_named_with_its_place(tmp_path, content, name, what):
    with pytest.raises(DataError, match=what):
        texts(tmp_path, content, name)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "BOMB_BYTES", 4 << 20)
    with gzip.open(tmp_path / "bomb.gz", "wb") as handle:
        for _ in range(8):
            handle.write(b" " * ((1 << 20) - 1) + b"\n")
    with pytest.raises(DataError, match="unpacks to more than 400 times"):
        list(Source((str(tmp_path / "bomb.gz"),)).texts())


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    for path, what in [("fifo", "not a regular file"), ("link", "points nowhere"), (".", "not a regular file")]:
        with pytest.raises(DataError, match=what):
            list(Source((str(tmp_path / path),)).texts())
    with pytest.raises(DataError, match="not a regular file"):
        list(Source(("/dev/zero",)).texts())


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"line\n" * (1 << 19))
    blocks = Source((str(path),)).blocks()
    next(blocks)
    path.write_bytes(b"other\n" * (1 << 19))
    with pytest.raises(DataError, match="changed while it was read"):
        list(blocks)


def test_one_huge_line_takes_bounded_memory(tmp_path):
    path = tmp_path / "line.txt"
    with open(path, "wb") as handle:
        handle.truncate(1 << 30)  # a gigabyte of NUL in one line, sparse on disk
    result = []

    def read():
        with pytest.raises(DataError, match="more than 16 MiB") as error:
            list(Source((str(path),)).texts())
        result.append(error)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(30)
    assert result
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
