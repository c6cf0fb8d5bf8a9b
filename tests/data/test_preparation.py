"""Corpora larger than memory: the same stores, however many processes make them, whatever interrupts them."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.store import build as building
from lmtrain.data.store.build import locked, remove_abandoned
from lmtrain.data.store.token_store import TokenStore, open_store
from lmtrain.data.text import digests, reading
from lmtrain.data.text.digests import Digests, unwatched
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers import learning, pieces, subword, vocabulary
from lmtrain.data.tokenizers.base import FIRST
from lmtrain.data.tokenizers.counting import WordCounts, merge_runs, most_frequent
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer, WordTokenizer
from lmtrain.errors import DataError
from lmtrain.system import workers
from lmtrain.system.files import sealed
from tests.conftest import sentences

SPACES = " \n\t\r\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000"
PARTS = [
    "a",
    "b",
    "the",
    "it's",
    "déjà",
    "한국어",
    "e\u0301",
    "12",
    "...",
    "x" * 8,
    "y" * 9,
    "z" * 24,
    "w" * 25,
    "\x01",
    "\u200b",
    "🎉",
]
WRITTEN = st.lists(st.sampled_from(PARTS) | st.text(SPACES, min_size=1, max_size=3) | st.text(max_size=9)).map("".join)
EVEN = st.lists(st.sampled_from(PARTS)).map(" ".join)


def without(text, *characters):
    for character in characters:
        text = text.replace(character, "")
    return text


@settings(max_examples=300)
@given(texts=st.lists(WRITTEN | EVEN, min_size=1), known=st.sets(st.sampled_from(PARTS) | st.text("abc한", min_size=1)))
def test_words_are_looked_up_as_one_by_one(texts, known):
    words = WordTokenizer(sorted(known))
    flat, lengths = words._encode_slowly(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "SMALL_TEXT", 0)
        found = words.encode_texts(texts)
    assert [part.tolist() for part in found] == [flat.tolist(), lengths.tolist()]


def test_words_that_share_a_slot_are_told_apart():
    words = [f"w{number}" for number in range(50000)]
    texts = [" ".join(words[k::100]) + " w50000 v1" for k in range(100)]
    known = WordTokenizer(words)
    assert known.encode_texts(texts)[0].tolist() == known._encode_slowly(texts)[0].tolist()


SUBWORDS = {
    kind: train_tokenizer(kind, [sentences(200, 1), "the cat's 12 déjà 한국어 ... xxxxxxxx"] * 3, vocab_size=320)
    for kind in ("bpe", "unigram")
}


@pytest.mark.parametrize("kind", SUBWORDS)
@settings(max_examples=300)
@given(texts=st.lists(EVEN | WRITTEN | st.text(max_size=30), min_size=1))
def test_pieces_have_the_ids_that_the_whole_text_has(kind, texts):
    subwords = SUBWORDS[kind]
    encoded = subwords._encode([text.encode("utf-8", "replace").decode() for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subword, "SMALL_TEXT", 0)
        assert subwords._pieces is not None
        flat, lengths = subwords.encode_texts([text.encode("utf-8", "replace").decode() for text in texts])
    assert flat.tolist() == [FIRST + number for ids in encoded for number in ids]
    assert lengths.tolist() == list(map(len, encoded))


def test_pieces_that_were_forgotten_are_learnt_again(monkeypatch):
    monkeypatch.setattr(pieces, "MOST_PIECES", 20)
    monkeypatch.setattr(subword, "SMALL_TEXT", 0)
    subwords = parse_tokenizer(SUBWORDS["bpe"].dumps())
    for turn in range(40):
        texts = [f"the w{turn} {word} w{turn % 7} cat" for word in ("a", "b" * turn, "한국")]
        flat, lengths = subwords.encode_texts(texts)
        encoded = subwords._encode(texts)
        assert flat.tolist() == [FIRST + number for ids in encoded for number in ids]
        assert lengths.tolist() == list(map(len, encoded))
    assert len(subwords._pieces._known) <= 30


@settings(max_examples=200)
@given(
    blocks=st.lists(st.lists(EVEN | WRITTEN.map(lambda text: without(text, "\0"))), min_size=1),
    held=st.integers(1, 20),
    size=st.integers(1, 30),
    least=st.integers(1, 4),
)
def test_counts_that_were_given_away_and_merged_are_exact(tmp_path_factory, blocks, held, size, least):
    counts, runs = WordCounts(held_short=held, held_long=held // 2, learnt=held), []
    for texts in blocks:
        runs += counts.add(texts)
    runs += counts.finish()
    folder = tmp_path_factory.mktemp("runs")
    for number, run in enumerate(runs):
        (folder / str(number)).write_bytes(run)
    handles = [open(folder / str(number), "rb") for number in range(len(runs))]  # noqa: SIM115
    found = most_frequent(merge_runs(handles, held_bytes=7), size, least, left_out=b"<unk>")
    for handle in handles:
        handle.close()
    counted = Counter(word for texts in blocks for text in texts for word in text.split() if word != "<unk>")
    kept = [word for word in counted if counted[word] >= least]
    assert [token.decode() for token in found] == sorted(kept, key=lambda word: (-counted[word], word))[:size]


@pytest.fixture
def use_workers(monkeypatch):
    """Three workers, and small blocks, for however little there is to do."""

    def use(count=3):
        monkeypatch.setattr(workers, "FEW_BYTES", 0)
        monkeypatch.setattr(workers, "core_count", lambda: count)
        monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)

    return use


def lines(count, seed=1):
    chance = random.Random(seed)
    words = [f"w{int(1.4**n)}" for n in range(40)] + ["한국어", "e\u0301te\u0301", "the"]
    return "".join(" ".join(chance.choices(words, k=chance.randint(0, 9))) + "\n" for _ in range(count))


def content(store):
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


SOURCES = {
    "text": {},
    "stream": {"stream": True},
    "part": {"part": "train", "valid_fraction": 0.3},
    "jsonl": {"format": "jsonl"},
}


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_store_does_not_show_how_many_made_it(tmp_path, use_workers, kind, name):
    texts = [lines(700), lines(300, seed=2).removesuffix("\n")]
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
        made_of = ByteTokenizer() if kind == "byte" else learn_tokenizer(kind, source, cache, 300, 2, print, unwatched)
        made.append((made_of.dumps(), content(open_store(source, made_of, cache))))
    assert made[0] == made[1]
    if kind != "byte":
        assert made[0][0] == train_tokenizer(kind, source.texts(), vocab_size=300, min_frequency=2).dumps()


@pytest.mark.parametrize(
    ("bad", "what"),
    [(b"\xff", "is not UTF-8"), (b"\0", "a NUL"), (b"77", "id 77 is not in"), (b"x" * (17 << 20), "more than 16 MiB")],
    ids=["bytes", "nul", "id", "line"],
)
def test_the_first_fault_is_told_by_workers_as_by_one(tmp_path, use_workers, bad, what):
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
    (tmp_path / "t.txt").write_text(lines(60000))
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


def test_preparing_loads_no_torch():
    for module in ("data.store.encoding", "data.tokenizers.counting", "data.preparation", "system.workers"):
        script = f"import sys, lmtrain.{module}; print('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


SCRIPT = """
import sys
from lmtrain.data.text import reading
from lmtrain.system import workers
workers.FEW_BYTES, workers.core_count, reading.BLOCK_BYTES = 0, lambda: 3, 1000
start, started = workers._Worker.__init__, []
workers._Worker.__init__ = lambda worker: start(worker) or started.append(worker)
import lmtrain
print("at the top level")
lmtrain.train(lmtrain.load_config("config.yaml", ["training.max_steps=1"]))
print(len(started), "workers")
"""


def test_a_script_without_a_guard_is_run_once_and_not_by_its_workers(corpus):
    """`multiprocessing` would run it again in each worker."""
    (corpus / "script.py").write_text(SCRIPT)
    for name in ("random.py", "struct.py", "lmtrain.py"):  # nor do workers import files of the working directory
        (corpus / "here").mkdir(exist_ok=True)
        (corpus / "here" / name).write_text("raise SystemExit('not mine')")
    for name in ("train.txt", "valid.txt", "config.yaml"):
        (corpus / name).rename(corpus / "here" / name)
    done = subprocess.run(
        [sys.executable, corpus / "script.py"], cwd=corpus / "here", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "at the top level\n9 workers\n"), done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_a_build_that_is_killed_again_and_again_comes_to_the_same_store(tmp_path, count):
    (tmp_path / "a.txt").write_text(lines(20000))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(lines(9000, seed=3).encode()))
    files = ("a.txt", "b.txt.gz")
    assert builder(tmp_path, 1, 1 << 30, *files).wait() == 0
    (home,) = (path.parent for path in (tmp_path / "cache").glob("*/store.json"))
    whole = content(TokenStore(home))
    (tmp_path / "cache").rename(tmp_path / "whole")
    chance, kills, left, went_on = random.Random(count), 0, 0, 0
    while True:
        process = builder(tmp_path, count, 20000, *files)
        started_s, most_s = time.monotonic(), chance.uniform(0, 0.1)
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
    assert content(TokenStore(tmp_path / "cache" / home.name)) == whole
    assert went_on == left > 0
    assert [*(tmp_path / "cache").glob(".building-*")] == []


@pytest.fixture
def broken_off(tmp_path, monkeypatch):
    """A source of which half is stored, and the directory of that build."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(building, "SAVE_BYTES", 1)
    path = tmp_path / "t.txt"
    path.write_text(lines(2000))
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
    assert content(store) == content(open_store(source, ByteTokenizer(), tmp_path / "other"))


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
    assert content(store) == content(open_store(source, ByteTokenizer(), tmp_path / "other"))


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


def test_who_comes_second_waits_and_says_so_once(tmp_path):
    (tmp_path / "t.txt").write_text(lines(100))
    source = Source(("t.txt",))
    (tmp_path / "cache").mkdir()
    key = Source((str(tmp_path / "t.txt"),)).key(Digests(None), ByteTokenizer().fingerprint())
    with locked(tmp_path / "cache", key, print):
        second = builder(tmp_path, 1, 1 << 30, *source.files)
        assert second.stdout.readline().startswith("waiting for another process that prepares the same")
    assert second.communicate()[0] == "reading t.txt\n"


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
    (tmp_path / "t.txt").write_text(lines(50))
    source = Source((str(tmp_path / "t.txt"),))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    whole, path = content(store), store.directory / "tokens.bin"
    time.sleep(0.02)
    assert not open_store(source, ByteTokenizer(), tmp_path / "cache").is_new
    before, data = path.stat(), bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    assert store.is_new
    assert content(store) == whole


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


def test_subwords_of_a_large_text_are_learnt_from_parts_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setitem(learning.SAMPLE_BYTES, "bpe", 20000)
    (tmp_path / "t.txt").write_text(lines(4000))
    said, watched = [], []
    source = Source((str(tmp_path / "t.txt"),))
    learn_tokenizer("bpe", source, tmp_path, 300, 1, said.append, lambda *how: watched.append(how))
    assert said[1].startswith("note: of that, 0 MiB are learnt from: evenly spaced parts, one in 8")
    assert watched[-1][1:] == (source.size(), source.size())


def test_prepare_does_all_that_train_would_read(small, shell):
    done = shell("prepare", "config.yaml", "data.test=valid.txt", "--json")
    assert (done.returncode, done.stderr.splitlines()[:2]) == (
        0,
        ["learning the word vocabulary from train.txt", "reading train.txt"],
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["store"], row["sequences"], row["built"]) for row in rows] == [
        ("train", 43, True),
        ("valid", 9, True),
        ("test", 9, False),
    ]
    messages = shell("prepare", "config.yaml").stdout.splitlines()
    assert messages[0] == "vocabulary: 12 tokens (word)"
    assert messages[1].startswith("train: 43 sequences, ")
    assert messages[-1] == "Next: lmtrain train config.yaml"
    trained = shell("train", "config.yaml", "training.max_steps=1")
    assert "reading" not in trained.stderr


def test_prepare_loads_no_torch(corpus):
    script = (
        "import sys; sys.argv = ['lmtrain', 'prepare', 'config.yaml']\n"
        "from lmtrain.cli import _run; assert _run() == 0; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=corpus)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
