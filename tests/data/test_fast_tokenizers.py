"""The fast ways through much text: whole blocks are encoded and counted as one text after the other is."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.text import reading
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers import learning, pieces, subword, vocabulary
from lmtrain.data.tokenizers.base import FIRST
from lmtrain.data.tokenizers.counting import WordCounts, merge_runs, most_frequent
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.data.tokenizers.vocabulary import WordTokenizer
from tests.conftest import sentences
from tests.data.conftest import random_lines

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


def one_by_one(tokenizer, texts):
    """The ids of texts, and how many each has, by a dictionary; a line break that it lacks is white space."""
    rows = [[tokenizer.ids.get(word, 3) for word in text.split()] for text in texts]
    return [id for row in rows for id in row], list(map(len, rows))


@settings(max_examples=300)
@given(texts=st.lists(WRITTEN | EVEN, min_size=1), known=st.sets(st.sampled_from(PARTS) | st.text("abc한", min_size=1)))
def test_words_are_looked_up_as_one_by_one(texts, known):
    words = WordTokenizer(sorted(known))
    flat, lengths = one_by_one(words, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "SMALL_TEXT", 0)
        found = words.encode_texts(texts)
    assert [part.tolist() for part in found] == [flat, lengths]


def test_words_that_share_a_slot_are_told_apart():
    words = [f"w{number}" for number in range(50000)]
    texts = [" ".join(words[k::100]) + " w50000 v1" for k in range(100)]
    known = WordTokenizer(words)
    assert known.encode_texts(texts)[0].tolist() == one_by_one(known, texts)[0]


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


def test_subwords_of_a_large_text_are_learnt_from_parts_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setitem(learning.SAMPLE_BYTES, "bpe", 20000)
    (tmp_path / "t.txt").write_text(random_lines(4000))
    said, watched = [], []
    source = Source((str(tmp_path / "t.txt"),))
    learn_tokenizer("bpe", source, tmp_path, said.append, lambda *how: watched.append(how), vocab_size=300)
    assert said[1].startswith("note: learning from 0 MiB of it: evenly spaced parts, one in 8")
    assert watched[-1][1:] == (source.size(), source.size())
