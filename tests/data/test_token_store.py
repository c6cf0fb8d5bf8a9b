"""From files to the token store: what is stored, what is refused and where, in bounded memory."""

import fcntl
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import threading
import unicodedata
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmtrain.data.store import token_store as corpus
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text import reading
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import DataError
from tests.conftest import shared


def texts(tmp_path, content, name="text.txt", **settings):
    path = tmp_path / name
    path.write_bytes(content)
    return list(Source((str(path),), **settings).texts())


def sequences(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def test_lines_lose_bom_and_carriage_return_and_are_normalised(tmp_path):
    content = "\ufeffone\r\ntwo\r\n\r\n  \nde\u0301ja\u0300 \u1112\u1161\u11ab\u1100\u1173\u11af\nlast".encode()
    assert texts(tmp_path, content) == ["one", "two", "déjà 한글", "last"]


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n")), min_size=1),
    format=st.sampled_from(["text", "jsonl"]),
    kind=st.sampled_from(["char", "byte"]),
)
def test_any_unicode_text_comes_back_from_the_store_in_nfc(tmp_path_factory, lines, format, kind):
    folder = tmp_path_factory.mktemp("text")
    written = [json.dumps({"text": line}) for line in lines] if format == "jsonl" else lines
    (folder / "t").write_bytes("".join(f"{line}\n" for line in written).encode())
    if format == "text":
        lines = [line.removesuffix("\r") for line in [lines[0].removeprefix("\ufeff"), *lines[1:]]]
    wanted = [unicodedata.normalize("NFC", line) for line in lines if line.strip()]
    assume(wanted)
    source = Source((str(folder / "t"),), format=format)
    tokenizer = train_tokenizer(kind, source.texts(), vocab_size=1 << 20)
    store = open_store(source, tokenizer, folder / "cache")
    assert [tokenizer.decode(ids) for ids in sequences(store)] == wanted
    assert store.counts.blank == len(lines) - len(wanted)


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


def test_the_store_holds_every_sequence_framed(tmp_path):
    (tmp_path / "text.txt").write_text("ab\n\nc\nab\n")
    source, tokenizer = Source((str(tmp_path / "text.txt"),)), ByteTokenizer()
    store = open_store(source, tokenizer, tmp_path / "cache")
    assert sequences(store) == [[1, 101, 102, 2], [1, 103, 2], [1, 101, 102, 2]]
    assert (store.tokens.dtype, store.offsets.dtype) == (np.dtype("<u2"), np.dtype("<u8"))
    counts = store.counts
    assert (counts.sequences, counts.tokens, counts.characters, counts.blank, counts.longest) == (3, 11, 8, 1, 2)
    assert store.hashes[0] == store.hashes[2] != store.hashes[1]
    assert store.overlap(store) == 3


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    (tmp_path / "ids.txt").write_text("70000 1\n")
    store = open_store(Source((str(tmp_path / "ids.txt"),)), IdsTokenizer(80000, 0), tmp_path / "cache")
    assert store.tokens.dtype == np.dtype("<u4")
    assert sequences(store) == [[80000, 70000, 1, 80001]]


def test_overlap_counts_each_sequence_that_stands_in_the_other_too(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "COMPARED", 7)
    chance = random.Random(1)
    texts = {name: [f"{chance.randint(0, 60):06b}" for _ in range(50)] for name in "ab"}
    stores = []
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines))
        stores.append(open_store(Source((str(tmp_path / name),)), ByteTokenizer(), tmp_path / "cache"))
    for (own, other), (store, beside) in zip(permutations(texts.values()), permutations(stores), strict=True):
        assert store.overlap(beside) == sum(line in other for line in own) > 0


def test_a_changed_file_is_never_served_stale(tmp_path):
    path, tokenizer = tmp_path / "text.txt", ByteTokenizer()
    path.write_text("ab\n")
    before = os.stat(path)
    first = open_store(Source((str(path),)), tokenizer, tmp_path / "cache")
    path.write_text("cd\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sequences(open_store(Source((str(path),)), tokenizer, tmp_path / "cache")) != sequences(first)


def test_a_store_is_built_once_and_mended_when_broken(tmp_path):
    path, said = tmp_path / "text.txt", []
    path.write_text("ab\n")
    source = Source((str(path),))
    for _ in range(2):
        store = open_store(source, ByteTokenizer(), tmp_path / "cache", said.append)
    assert len(said) == 1
    (store.directory / "tokens.bin").write_bytes(b"\0")
    assert sequences(open_store(source, ByteTokenizer(), tmp_path / "cache", said.append)) == [[1, 101, 102, 2]]
    assert len(said) == 2


def test_two_builders_at_once_both_get_a_whole_store(tmp_path):
    (tmp_path / "text.txt").write_text("ab cd\n" * 20000)
    script = (
        "import sys; from lmtrain.data.store.token_store import *; from lmtrain.data.tokenizers.vocabulary import *;"
        "print(open_store(Source(('text.txt',)), ByteTokenizer(), 'cache').counts.sequences)"
    )
    builders = [
        subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert [builder.communicate()[0] for builder in builders] == [b"20000\n"] * 3
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_what_a_killed_builder_left_is_removed_and_a_living_one_s_is_not(tmp_path):
    (tmp_path / "text.txt").write_text("ab\n")
    for name in ("dead", "alive"):
        (tmp_path / "cache" / f".building-{name}").mkdir(parents=True)
        (tmp_path / "cache" / f".building-{name}.lock").touch()
    with open(tmp_path / "cache" / ".building-alive.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_store(Source((str(tmp_path / "text.txt"),)), ByteTokenizer(), tmp_path / "cache")
        left = sorted(path.name for path in (tmp_path / "cache").glob(".building-*"))
        assert left == [".building-alive", ".building-alive.lock"]


@pytest.mark.parametrize("name", ["tokens", "offsets", "hashes"])
def test_a_store_with_a_flipped_bit_is_built_again(tmp_path, name):
    (tmp_path / "text.txt").write_text("ab\ncd\n")
    source = Source((str(tmp_path / "text.txt"),))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    wanted, path = sequences(store), store.directory / f"{name}.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert sequences(open_store(source, ByteTokenizer(), tmp_path / "cache")) == wanted
    assert path.read_bytes() != data


def test_a_file_of_another_format_is_not_served_from_the_store(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "b"}\n')
    stores = [open_store(Source((str(tmp_path / n),)), ByteTokenizer(), tmp_path / "c") for n in ("a.txt", "a.jsonl")]
    assert [store.counts.longest for store in stores] == [13, 1]


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
        (b"fine\nbad \xff\n", "t.txt", r"t\.txt:2:5: byte 9 is not UTF-8"),
        ("\ufeff가\n".encode() + b"\xe0", "t.txt", r"t\.txt:2:1: byte 7 is not UTF-8"),
        (b"fine\nno\0\n", "t.txt", r"t\.txt:2:3: a NUL"),
        (b"x" * (17 << 20), "t.txt", r"t\.txt:1: a line of more than 16 MiB"),
        (gzip.compress(b"line\n" * 1000, mtime=0)[:40], "t.gz", r"t\.gz: broken gzip"),
        (b"no gzip", "t.gz", r"t\.gz: broken gzip"),
        (b'{"text": "a"}\n{"text": ]\n', "t.jsonl", r"t\.jsonl:2:10: not JSON"),
        (b'{"txt": "a"}\n', "t.jsonl", r"t\.jsonl:1: no field 'text'.*it has 'txt'"),
        (b'{"text": 3}\n', "t.jsonl", r"t\.jsonl:1: not an object whose field 'text' is text"),
        (b"[1]\n", "t.jsonl", r"t\.jsonl:1: not an object"),
        (b'{"text": "a\\u0000"}\n', "t.jsonl", r"t\.jsonl:1: a NUL"),
    ],
)
def test_a_fault_of_a_file_is_named_with_its_place(tmp_path, content, name, what):
    with pytest.raises(DataError, match=what):
        texts(tmp_path, content, name)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BOMB_BYTES", 4 << 20)
    with gzip.open(tmp_path / "bomb.gz", "wb") as handle:
        for _ in range(8):
            handle.write(b" " * ((1 << 20) - 1) + b"\n")
    with pytest.raises(DataError, match="unpacks to more than 400 times"):
        list(Source((str(tmp_path / "bomb.gz"),)).texts())


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    for path, what in [("fifo", "not a regular file"), ("link", "points nowhere"), (".", "a directory")]:
        with pytest.raises(DataError, match=what):
            list(Source((str(tmp_path / path),)).texts())
    with pytest.raises(DataError, match="not a regular file"):
        list(Source(("/dev/zero",)).texts())


def test_no_text_is_refused(tmp_path):
    for content in (b"", b"\n \n\t\n"):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"t\.txt: no text"):
            open_store(Source((str(tmp_path / "t.txt"),)), ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bad_id_is_named_with_line_and_column(tmp_path):
    (tmp_path / "ids.txt").write_text("1 2\n\n3 44 444\n")
    with pytest.raises(DataError, match=r"ids\.txt:3:6: id 444 is not in 0\.\.99"):
        open_store(Source((str(tmp_path / "ids.txt"),)), IdsTokenizer(100, 0), tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"line\n" * (1 << 19))
    blocks = Source((str(path),)).blocks()
    next(blocks)
    path.write_bytes(b"other\n" * (1 << 19))
    with pytest.raises(DataError, match="changed while it was read"):
        list(blocks)


def test_korean_reviews_survive_the_way_there_and_back(tmp_path):
    path = shared("korean_reviews") / "valid.txt"
    source = Source((str(path),))
    tokenizer = train_tokenizer("char", source.texts(), vocab_size=30000)
    store = open_store(source, tokenizer, tmp_path)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert store.counts.unknown_tokens == 0
    assert [tokenizer.decode(ids) for ids in sequences(store)[:500]] == lines[:500]


BUILD = """
import resource, sys
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.learning import train_tokenizer
source = Source((sys.argv[1],))
tokenizer = train_tokenizer("word", source.texts(), vocab_size=1000)
open_store(source, tokenizer, "cache")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(tmp_path: Path, megabytes: int) -> int:
    path = tmp_path / f"{megabytes}.txt"
    line = " ".join(f"word{n}" for n in range(9)) + "\n"
    with open(path, "w") as handle:
        for _ in range(megabytes):
            handle.write(line * ((1 << 20) // len(line)))
    done = subprocess.run([sys.executable, "-c", BUILD, path], cwd=tmp_path, capture_output=True, text=True, check=True)
    path.unlink()
    return int(done.stdout)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    assert peak_kib(tmp_path, 24) < peak_kib(tmp_path, 4) + 8 * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_a_corpus_of_500_mb(tmp_path):
    assert peak_kib(tmp_path, 500) < peak_kib(tmp_path, 5) + 16 * 1024


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
