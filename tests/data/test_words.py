"""Words and marks are cut at Unicode's word boundaries and put together without loss; line breaks; lower case."""

import json
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.boundaries import BoundaryTokenizer
from lmtrain.data.tokenizers.learning import learn_tokenizer, train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.data.tokenizers.vocabulary import WordTokenizer
from tests.conftest import SHARED


def folded(text):
    """White space normalised, by Python alone."""
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def learnt(*texts, **more):
    return train_tokenizer("word", texts, vocab_size=1 << 20, **{"split": "words", **more})


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))


@settings(max_examples=300)
@given(text=TEXTS.map(lambda text: unicodedata.normalize("NFC", text)))
def test_any_text_comes_back_with_its_white_space_folded(text):
    tokenizer = learnt(text, "x")
    assert tokenizer.decode(tokenizer.encode(text)) == folded(text).strip(" ")


EXAMPLES = {
    "don't stop, l’eau": ["don't", " stop", ",", " l’eau"],
    "3.14 of 1,000.50!": ["3.14", " of", " 1,000.50", "!"],
    "see https://a.b/c?d=e_f.": [" see", " https", ":", "/", "/", "a.b", "/", "c", "?", "d", "=", "e_f", "."],
    "👨‍👩‍👧‍👦 🇰🇷🇺🇸 👍🏽": ["👨‍👩‍👧‍👦", " 🇰🇷", "🇺🇸", " 👍🏽"],
    "한국어를, 잘해요!!": ["한국어를", ",", " 잘해요", "!", "!"],
    "हिन्दी भाषा।": ["हिन्दी", " भाषा", "।"],
    '"Run," said (he) - well-known': ['"', "Run", ",", '"', " said", " (", "he", ")", " -", " well", "-", "known"],
    "日本語 カタカナ": ["日", "本", "語", " カタカナ"],
    "السلام عليكم؟": ["السلام", " عليكم", "؟"],
    "cafe\u0323 n\u0303": ["cafe\u0323", " ñ"],
    "... ?!": [".", ".", ".", " ?", "!"],
    "red\nblue ,\n\nsea": ["red", "\n", " blue", " ,", "\n", "\n", " sea"],
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_where_words_and_marks_are_cut(text):
    text, pieces = unicodedata.normalize("NFC", text), [unicodedata.normalize("NFC", each) for each in EXAMPLES[text]]
    tokenizer = learnt(text)
    shown = [tokenizer.tokens[token - 4] for token in tokenizer.encode(text)]
    assert shown == [f" {pieces[0].strip(' ')}", *pieces[1:]]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_words_and_marks():
    tokenizer = learnt("the cat , (sat)", "a <unk> b")
    assert tokenizer.decode(tokenizer.encode("the zebra sat")) == "the <unk> <unk>"  # " sat" stood never apart
    assert tokenizer.encode("a <unk> b")[1] == 3  # as in the published corpora
    assert tokenizer.decode(tokenizer.encode("a <unk> b")) == "a <unk> b"


@pytest.mark.parametrize("split", ["words", "whitespace"])
def test_line_breaks_are_tokens_where_the_vocabulary_has_them(split):
    text = "roses are red\n violets \n\nblue"
    tokenizer = learnt(text, split=split)
    assert tokenizer.decode(tokenizer.encode(text)) == "roses are red\nviolets\n\nblue"
    without = learnt("roses are red violets blue", split=split)
    assert without.decode(without.encode(text)) == "roses are red violets blue"
    many = [text, "", "blue", "\nred"] * 3000  # more text takes another way
    for each in (tokenizer, without):
        flat, lengths = each.encode_texts(many)
        assert [int(token) for token in flat] == [token for one in many for token in each.encode(one)]
        assert lengths.tolist() == [len(each.encode(one)) for one in many]


@settings(max_examples=50)
@given(texts=st.lists(TEXTS.map(lambda text: unicodedata.normalize("NFC", text).strip("\n")), min_size=1))
@pytest.mark.parametrize("split", ["words", "whitespace"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_a_corpus_is_counted_as_its_texts_are(tmp_path_factory, split, lowercase, texts):
    folder = tmp_path_factory.mktemp("counted")
    (folder / "t.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in [*texts, "x"]))
    settings = {"vocab_size": 1 << 20, "split": split, "lowercase": lowercase}
    source = Source((str(folder / "t.jsonl"),), field="text")
    from_files = learn_tokenizer("word", source, folder, lambda line: None, lambda *how: None, **settings)
    assert from_files.dumps() == train_tokenizer("word", [*texts, "x"], **settings).dumps()
    assert parse_tokenizer(from_files.dumps()).dumps() == from_files.dumps()


@pytest.mark.parametrize("kind", ["char", "byte", "word", "words", "bpe", "unigram"])
def test_lower_case_is_for_texts_and_prompts_alike(kind):
    split = {"split": "words"} if kind == "words" else {}
    tokenizer = train_tokenizer(
        kind.removesuffix("s"), ["The CAT sat", "ÀÉ 가"], vocab_size=300, lowercase=True, **split
    )
    assert tokenizer.decode(tokenizer.encode("THE cat SAT")) == "the cat sat"
    again = parse_tokenizer(tokenizer.dumps())
    assert (again.lowercase, again.encode("Àé THE")) == (True, tokenizer.encode("àé the"))


def kinds(texts):
    for kind, more in [("char", {}), ("byte", {}), ("word", {}), ("word", {"split": "words"}), ("bpe", {})]:
        yield train_tokenizer(kind, texts, vocab_size=1000, **more)


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from(["the", "cat", "가나", "é,", "(x)", "\n", "naïve."]), max_size=9), min_size=1))
def test_bits_per_character_can_be_compared_between_tokenizers(rows):
    """All count the same characters of a text whose white space is single spaces."""
    texts = [" ".join(row).replace(" \n", "\n").replace("\n ", "\n").strip(" ") for row in rows]
    many = texts * 400 if sum(map(len, texts)) > 50 else texts
    wanted = sum(map(len, many)), sum(len(text.encode()) for text in many)
    for tokenizer in kinds([*texts, "x\ny"]):
        measured = tokenizer.encode_measured(many)
        assert (measured.characters, measured.bytes) == wanted, tokenizer
        assert measured[0].tolist() == tokenizer.encode_texts(many)[0].tolist()


@settings(max_examples=100)
@given(text=TEXTS.map(lambda text: unicodedata.normalize("NFC", text)))
@pytest.mark.parametrize("split", ["words", "whitespace"])
@pytest.mark.parametrize("times", [1, 2000])
def test_folded_white_space_is_not_counted(split, times, text):
    assume("<unk>" not in text)  # it is the unknown word
    tokenizer, texts = learnt(text, "a b é\nx", split=split), [text, " a  b\té ", ""]
    measured = tokenizer.encode_measured(texts * times)
    back = [tokenizer.decode(tokenizer.encode(each)) for each in texts]
    assert measured.characters == times * sum(map(len, back))
    assert measured.bytes == times * sum(len(each.encode()) for each in back)


@pytest.mark.parametrize("times", [1, 5000])
def test_unknown_words_are_not_counted(times):
    texts = ["a zébra b", "가 나"] * times
    for split, known in (("whitespace", "a  b가 "), ("words", "a b가")):
        measured = learnt("x a b 가", split=split).encode_measured(texts)
        assert (measured.characters, measured.bytes) == (times * len(known), times * len(known.encode()))
    characters = train_tokenizer("char", ["a zbr 가"], vocab_size=99).encode_measured(texts)
    assert (characters.characters, characters.bytes) == (times * 10, times * 12)


@pytest.mark.parametrize("corpus", ["tinyshakespeare", "korean_reviews"])
@pytest.mark.skipif(not SHARED.is_dir(), reason="the corpora of ../shared/data are not here")
def test_ten_thousand_lines_come_back(corpus):
    lines = (SHARED / corpus / "train.txt").read_text().splitlines()[:10_000]
    lines = [unicodedata.normalize("NFC", line) for line in lines]
    tokenizer = learnt(*lines)
    flat, lengths = tokenizer.encode_texts(lines)
    ends = lengths.cumsum()
    back = [tokenizer.decode(flat[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    assert back == [folded(line) for line in lines]
    whitespace = learnt(*lines, split="whitespace")
    assert isinstance(tokenizer, BoundaryTokenizer)
    assert isinstance(whitespace, WordTokenizer)
    assert tokenizer.vocab_size < whitespace.vocab_size
