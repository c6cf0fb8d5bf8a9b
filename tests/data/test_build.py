"""Stores are built the same by any number of processes, at once or one after the other, whatever interrupts them."""

import csv
import fcntl
import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmtrain.data.store import build as building
from lmtrain.data.store.build import locked, remove_abandoned
from lmtrain.data.store.token_store import TokenStore, open_store
from lmtrain.data.text import reading
from lmtrain.data.text.digests import Digests, unwatched
from lmtrain.data.text.formats import parquet as parquet_format
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import DataError
from lmtrain.system import workers
from lmtrain.system.files import sealed
from tests.data.conftest import random_lines, store_files


@pytest.fixture
def use_workers(monkeypatch):
    """Three workers, and small blocks, for however little there is to do."""

    def use(count=3):
        monkeypatch.setattr(workers, "FEW_BYTES", 0)
        monkeypatch.setattr(workers, "core_count", lambda: count)
        monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
        monkeypatch.setattr(parquet_format, "BLOCK_BYTES", 1000)

    return use


SOURCES = {
    "text": {},
    "stream": {"stream": True},
    "part": {"part": "train", "valid_fraction": 0.3},
    "jsonl": {"format": "jsonl"},
}


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_store_does_not_show_how_many_made_it(tmp_path, use_workers, kind, name):
    texts = [random_lines(700), random_lines(300, seed=2).removesuffix("\n")]
    if name == "jsonl":
        texts = ["\n".join(json.dumps({"text": line}) for line in text.split("\n")) for text in texts]
    (tmp_path / "a").write_text(texts[0])
    (tmp_path / "b.gz").write_bytes(gzip.compress(texts[1].encode()))
    source = Source((str(tmp_path / "a"), str(tmp_path / "b.gz")), **SOURCES[name])
    made = []
    for count in (1, 3):
        use_workers(count)
        cache = tmp_path / str(count)
        cache.mkdir()
        made_of = (
            ByteTokenizer()
            if kind == "byte"
            else learn_tokenizer(kind, source, cache, print, unwatched, vocab_size=300, min_frequency=2)
        )
        made.append((made_of.dumps(), store_files(open_store(source, made_of, cache))))
    assert made[0] == made[1]
    if kind != "byte":
        assert made[0][0] == train_tokenizer(kind, source.texts(), vocab_size=300, min_frequency=2).dumps()


def csv_of(path, texts):
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows([["id", "text"], *enumerate(texts)])


def parquet_of(path, texts):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=300)


WRITERS = {
    "t.csv": csv_of,
    "t.json": lambda path, texts: path.write_text(json.dumps(texts)),
    "t.jsonl": lambda path, texts: path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts)),
    "t.parquet": parquet_of,
    "t.txt": lambda path, texts: path.write_text("\n\n".join(texts)),
}


@pytest.mark.parametrize("kind", ["word", "char"])
@pytest.mark.parametrize("name", WRITERS)
def test_tables_records_and_paragraphs_are_stored_the_same_by_any_number_and_continued(
    tmp_path, use_workers, monkeypatch, kind, name
):
    texts = [f"{line}\nand {number}, more" for number, line in enumerate(random_lines(900).split("\n")) if line.strip()]
    WRITERS[name](tmp_path / name, texts)
    source = Source((str(tmp_path / name),), separator="paragraph" if name == "t.txt" else "line")
    made_of, made = train_tokenizer(kind, source.texts(), vocab_size=300, min_frequency=2), []
    for count in (1, 3):
        use_workers(count)
        cache = tmp_path / str(count)
        cache.mkdir()
        learnt = learn_tokenizer(kind, source, cache, print, unwatched, vocab_size=300, min_frequency=2)
        assert learnt.dumps() == made_of.dumps()
        made.append(store_files(open_store(source, made_of, cache)))
    monkeypatch.setattr(building, "SAVE_BYTES", 1)

    def stop(what, done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(source, made_of, tmp_path / "continued", watch=stop)
    store = open_store(source, made_of, tmp_path / "continued")
    assert store.was_continued
    assert [*made, store_files(store)] == [made[0]] * 3


@pytest.mark.parametrize(
    ("bad", "what"),
    [(b"\xff", "not UTF-8"), (b"\0", "a NUL"), (b"77", "id 77 is not in"), (b"x" * (17 << 20), "more than 16 MiB")],
    ids=["bytes", "nul", "id", "line"],
)
def test_several_workers_report_the_first_fault_as_one_does(tmp_path, use_workers, bad, what):
    path = tmp_path / "t.txt"
    path.write_bytes(b"1 2 3\n" * 3000 + b"4 " + bad + b"\n" + b"1 2 3\n" * 3000 + b"\0\xff\n")
    messages = []
    for count in (1, 3):
        use_workers(count)
        with pytest.raises(DataError, match=what) as error:
            open_store(Source((str(path),)), IdsTokenizer(9, 0), tmp_path / "cache")
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert ":3001" in messages[0]
    assert [*(tmp_path / "cache").iterdir()] == []


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


BUILD = """
import sys
from lmtrain.data.text import reading
from lmtrain.data.store import build as building
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.system import workers
building.SAVE_BYTES, reading.BLOCK_BYTES, workers.FEW_BYTES = int(sys.argv[2]), 1000, 0
workers.core_count = lambda: int(sys.argv[1])
open_store(Source(tuple(sys.argv[3:])), ByteTokenizer(), "cache", lambda line: print(line, flush=True))
"""


def builder(folder, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE, text=True, **more
    )


def test_no_worker_outlives_its_parent(tmp_path):
    (tmp_path / "t.txt").write_text(random_lines(60000))
    process = builder(tmp_path, 3, 1 << 30, "t.txt")
    while len(found := children(process.pid)) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    end_s = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_a_build_that_is_killed_again_and_again_comes_to_the_same_store(tmp_path, count):
    (tmp_path / "a.txt").write_text(random_lines(20000))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random_lines(9000, seed=3).encode()))
    files = ("a.txt", "b.txt.gz")
    assert builder(tmp_path, 1, 1 << 30, *files).wait() == 0
    (home,) = (path.parent for path in (tmp_path / "cache").glob("*/store.json"))
    whole = store_files(TokenStore(home))
    (tmp_path / "cache").rename(tmp_path / "whole")
    chance, kills, left, went_on = random.Random(count), 0, 0, 0
    while True:
        process = builder(tmp_path, count, 20000, *files)
        started_s, most_s = time.monotonic(), chance.uniform(0, 0.02)
        progress = tmp_path / "cache" / f".building-{home.name}" / building.PROGRESS
        before = progress.read_bytes() if progress.exists() else b""
        while process.poll() is None:  # some way beyond the first new save
            if (progress.exists() and progress.read_bytes() != before) or time.monotonic() - started_s > 20:
                time.sleep(most_s)
                break
            time.sleep(0.005)
        process.kill()
        said = process.communicate()[0]
        went_on += "continuing after" in said
        if process.returncode == 0:
            break
        kills += 1
        left += progress.exists()  # else it was killed behind its end
        assert kills < 100
    assert store_files(TokenStore(tmp_path / "cache" / home.name)) == whole
    assert went_on == left > 0
    assert [*(tmp_path / "cache").glob(".building-*")] == []


@pytest.fixture
def broken_off(tmp_path, monkeypatch):
    """A source of which half is stored, and the directory of that build."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(building, "SAVE_BYTES", 1)
    path = tmp_path / "t.txt"
    path.write_text(random_lines(2000))
    source, half = Source((str(path),)), path.stat().st_size // 2

    def stop(what, done_bytes, total_bytes):
        if done_bytes > half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(source, ByteTokenizer(), tmp_path / "cache", watch=stop)
    (directory,) = (path for path in (tmp_path / "cache").glob(".building-*") if path.is_dir())
    return source, directory


def test_what_is_stored_is_not_parsed_again(tmp_path, monkeypatch, broken_off):
    source, _ = broken_off
    offsets = []
    parse = Source.parse
    monkeypatch.setattr(Source, "parse", lambda self, raw: offsets.append(raw.offset) or parse(self, raw))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    assert min(offsets) > source.size() // 2
    monkeypatch.undo()
    assert store_files(store) == store_files(open_store(source, ByteTokenizer(), tmp_path / "other"))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "hashes.bin", "progress.json"])
@pytest.mark.parametrize("damage", ["bit", "short", "gone"])
def test_a_damaged_remainder_is_thrown_away(tmp_path, broken_off, name, damage):
    source, directory = broken_off
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 3] ^= 1
    (directory / name).unlink()
    if damage != "gone":
        (directory / name).write_bytes(data if damage == "bit" else data[:100])
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    assert store_files(store) == store_files(open_store(source, ByteTokenizer(), tmp_path / "other"))


def test_builds_of_others_are_kept_where_they_can_be_continued(tmp_path):
    for name, content, age_s in (
        ("none", None, 0),
        ("bad", b"{}", 0),
        ("old", sealed({}), 8 * 86400),
        ("good", sealed({}), 0),
    ):
        (tmp_path / f".building-{name}").mkdir()
        (tmp_path / f".building-{name}.lock").touch()
        if content is not None:
            progress = tmp_path / f".building-{name}" / building.PROGRESS
            progress.write_bytes(content)
            os.utime(progress, (time.time() - age_s,) * 2)
    remove_abandoned(tmp_path, but="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".building-good", ".building-good.lock"]


def test_a_second_builder_waits_for_the_first_and_reports_it_once(tmp_path):
    (tmp_path / "t.txt").write_text(random_lines(100))
    source = Source(("t.txt",))
    (tmp_path / "cache").mkdir()
    key = Source((str(tmp_path / "t.txt"),)).key(Digests(None), ByteTokenizer().fingerprint())
    with locked(tmp_path / "cache", key, print):
        second = builder(tmp_path, 1, 1 << 30, *source.files)
        assert second.stdout.readline().startswith("waiting for another process that prepares the same")
    assert second.communicate()[0] == "reading t.txt\n"


def test_a_text_that_changes_while_its_store_is_built_gives_none(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("ab\n" * 9)
    finish = building.Build.finish

    def late(self, counts):
        path.write_text("cd\n" * 9)
        finish(self, counts)

    monkeypatch.setattr(building.Build, "finish", late)
    with pytest.raises(DataError, match="changed while it was read"):
        open_store(Source((str(path),)), ByteTokenizer(), tmp_path / "cache")
    assert [*(tmp_path / "cache").glob("[!.]*")] == []


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
