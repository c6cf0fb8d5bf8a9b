"""From files to the token store: what is stored, what is refused and where, in bounded memory."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmtrain.data.store import token_store as corpus
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import DataError
from tests.conftest import shared


def sequences(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r")), min_size=1),
    format=st.sampled_from(["text", "jsonl"]),
    kind=st.sampled_from(["char", "byte"]),
)
def test_any_unicode_text_comes_back_from_the_store_in_nfc(tmp_path_factory, lines, format, kind):
    folder = tmp_path_factory.mktemp("text")
    written = [json.dumps({"text": line}) for line in lines] if format == "jsonl" else lines
    (folder / "t").write_bytes("".join(f"{line}\n" for line in written).encode())
    if format == "text":
        lines = [lines[0].removeprefix("\ufeff"), *lines[1:]]
    wanted = [unicodedata.normalize("NFC", line) for line in lines if line.strip()]
    assume(wanted)
    source = Source((str(folder / "t"),), format=format)
    tokenizer = train_tokenizer(kind, source.texts(), vocab_size=1 << 20)
    store = open_store(source, tokenizer, folder / "cache")
    assert [tokenizer.decode(ids) for ids in sequences(store)] == wanted
    assert store.counts.blank == len(lines) - len(wanted)


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
    assert sequences(open_store(Source((str(path),)), tokenizer, tmp_path / "cache")) == [[1, 101, 102, 2]]
    path.write_text("cd\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sequences(open_store(Source((str(path),)), tokenizer, tmp_path / "cache")) == [[1, 103, 104, 2]]


def test_a_store_is_built_once_and_again_when_damaged(tmp_path):
    path, said = tmp_path / "text.txt", []
    path.write_text("ab\n")
    source = Source((str(path),))
    for _ in range(2):
        store = open_store(source, ByteTokenizer(), tmp_path / "cache", said.append)
    assert len(said) == 1
    (store.directory / "tokens.bin").write_bytes(b"\0")
    assert sequences(open_store(source, ByteTokenizer(), tmp_path / "cache", said.append)) == [[1, 101, 102, 2]]
    assert len(said) == 2


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
