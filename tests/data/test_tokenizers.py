"""Text to ids and back, for every kind."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.library import as_artefact_errors, discard_panics
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.errors import ArtefactError, DataError

KOREAN = "나는 이불을 뒤집어 쓰고 펑펑 울었다"
TEXTS = [KOREAN, "hello <eos> world", "the cat  sat\té 🎉", "<pad> <bos> <unk>"] * 3
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def tokenizer_of(kind, texts=TEXTS, **settings):
    return train_tokenizer(kind, texts, **{"vocab_size": 400, "min_frequency": 1} | settings)


BYTES = tokenizer_of("byte")
SUBWORDS = [tokenizer_of("bpe"), tokenizer_of("unigram")]


@given(text=UNICODE)
def test_bytes_come_back_as_they_were_whatever_the_text(text):
    assert parse_tokenizer(BYTES.dumps()).decode(BYTES.encode(text)) == text
    assert len(BYTES.encode(text)) == len(text.encode())


@given(texts=st.lists(UNICODE.filter(bool), min_size=1), chance=st.randoms())
def test_known_characters_come_back_as_they_were_in_any_order(texts, chance):
    tokenizer = tokenizer_of("char", texts, vocab_size=1 << 20)
    for text in [*texts, "".join(chance.choices("".join(texts), k=20))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.unk_id not in tokenizer.encode(text)


@settings(max_examples=50)
@given(text=UNICODE)
def test_subwords_come_back_as_they_were_whatever_the_text(text):
    for tokenizer in SUBWORDS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.unk_id is None


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe", "unigram"])
def test_dumped_and_loaded_it_is_the_same(kind):
    tokenizer = tokenizer_of(kind)
    again = parse_tokenizer(tokenizer.dumps())
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.vocab_size == tokenizer.vocab_size
    for text in [*TEXTS, "unheard-of ☃"]:
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe", "unigram"])
def test_text_that_looks_like_a_special_token_is_text(kind):
    tokenizer = tokenizer_of(kind)
    flat, lengths = tokenizer.encode_texts(TEXTS)
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in TEXTS]
    assert len(flat) == lengths.sum()
    assert flat.max() < tokenizer.vocab_size
    special = {0, 1, 2} if kind == "word" else {0, 1, 2, 3}  # a literal <unk> is the unknown word
    assert not special & set(flat.tolist())


def test_words_share_one_unknown_and_rare_ones_are_it():
    tokenizer = tokenizer_of("word", ["a a b b b c", "<unk> a"], min_frequency=2)
    assert tokenizer.tokens == ["a", "b"]  # equal counts in the order of their code points
    assert tokenizer.encode("b c a <unk>") == [5, 3, 4, 3]
    assert tokenizer.decode([1, 5, 3, 4, 2]) == "b <unk> a"
    assert tokenizer_of("word", ["a a b b b c"], vocab_size=5).tokens == ["b"]


def test_more_than_65536_words_keep_their_ids():
    words = [f"w{n}" for n in range(70000)]
    tokenizer = tokenizer_of("word", [" ".join(words)], vocab_size=80000)
    assert tokenizer.decode(tokenizer.encode(" ".join(words[::-1]))) == " ".join(words[::-1])


def test_ids_keep_their_values():
    tokenizer = tokenizer_of("ids", vocab_size=100)
    assert tokenizer.encode("85 14 1") == [85, 14, 1]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (100, 101, 102)
    assert tokenizer.decode([100, 85, 14, 101, 0]) == "85 14"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("3 -1", "not in 0..99"),
        ("100", "not in 0..99; raise tokenizer.vocab_size"),
        (str(2**70), "not in 0..99"),
        (str(2**16 + 5), "not in 0..99"),
        ("3 x", "'x' is not an id"),
        ("3.0", "'3.0' is not an id"),
        ("٣", "is not an id"),
        ("0", "0 is the pad id"),
    ],
)
def test_what_is_not_an_id_is_refused(text, what):
    with pytest.raises(DataError, match=what):
        tokenizer_of("ids", vocab_size=100).encode(text)


def test_a_tokenizer_file_of_the_library_is_taken(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_of("bpe").state()["tokenizer"]))
    tokenizer = tokenizer_of("file", path=str(path))
    assert tokenizer.decode(tokenizer.encode(KOREAN)) == KOREAN
    assert parse_tokenizer(tokenizer.dumps()).encode(KOREAN) == tokenizer.encode(KOREAN)


def test_a_text_without_a_frequent_word_is_refused():
    with pytest.raises(DataError, match="no token occurs 2 times"):
        tokenizer_of("word", ["a b c"], min_frequency=2)


def library_json(**changes):
    return json.dumps(tokenizer_of("bpe").state()["tokenizer"] | changes)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", '{"format": 1}', '{"format": 1, "kind": "word"}', '{"format": 1, "kind": "magic"}',
     '{"format": 1, "kind": "word", "tokens": ["a", "a"]}', '{"format": 1, "kind": "char", "tokens": ["ab"]}',
     '{"format": 1, "kind": "ids", "ids": "x", "pad_id": 0}', '{"format": "x", "kind": "byte"}', "[" * 100000],
)  # fmt: skip
def test_what_is_not_a_tokenizer_is_an_artefact_error(content):
    with pytest.raises(ArtefactError, match=r"tokenizer\.json|vocabulary"):
        parse_tokenizer(content)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}",
        library_json(model={"type": "WordLevel", "vocab": {"a": 0, "b": 2}, "unk_token": "a"}),
        library_json(model={"type": "Unigram", "vocab": [], "unk_id": 5}),
        library_json(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
        ),
    ],
)
def test_a_bad_library_file_is_an_artefact_error_and_no_panic(content):
    with pytest.raises(ArtefactError, match=r"theirs\.json"):
        SubwordTokenizer(content, name="theirs.json")


def test_only_the_command_line_discards_what_a_panic_writes():
    ours = os.fstat(2).st_ino
    with as_artefact_errors("theirs"):
        assert os.fstat(2).st_ino == ours  # so other threads of the host process can go on writing to it
    with discard_panics(), as_artefact_errors("theirs"):
        assert os.fstat(2).st_ino != ours
    assert os.fstat(2).st_ino == ours


def test_a_newer_format_says_upgrade():
    with pytest.raises(ArtefactError, match="format 2 is newer"):
        parse_tokenizer('{"format": 2, "kind": "byte"}')
