"""`lmtrain check` as the doctor of data: what it says of sequences, tokens, copies, unknown words and markup."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.check import configuration
from lmtrain.check.configuration import describe_configuration
from lmtrain.check.data import examine_data
from lmtrain.check.markup import MarkupCount
from lmtrain.check.pieces import cut, token_writer
from lmtrain.config import load_config
from lmtrain.data.preparation import prepare_all
from lmtrain.data.text import excerpts, reading
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer, CharTokenizer

STREAM = ["batching.mode=stream", "model.bidirectional=false"]


@pytest.fixture
def examine(corpus):
    """Write the training and validation text, and return the findings on them by what they are about."""

    def run(train, valid="a b\n", *overrides, show=3):
        (corpus / "train.txt").write_text(train, encoding="utf-8", newline="")
        (corpus / "valid.txt").write_text(valid, encoding="utf-8", newline="")
        config = load_config("config.yaml", overrides)
        tokenizer, stores = prepare_all(config, lambda line: None)
        found = {}
        for finding in examine_data(config, tokenizer, stores, show):
            found.setdefault(finding.about, []).append(finding)
        return found

    return run


def test_sequences_are_shown_as_tokens_with_their_places(examine):
    found = examine("the cat\n\n나는 \x1b[1m책|을\nx\na b c d\n", "a\n", show=2)
    (finding,) = found["sequences"]
    assert finding.lines[1:] == ["train.txt:1  2 tokens: the|cat", "train.txt:3  2 tokens: 나는|\\x1b[1m책\\|을"]
    assert finding.figures["sequences"][1] == {
        "place": "train.txt:3",
        "tokens": 2,
        "pieces": ["나는", "\\x1b[1m책\\|을"],
    }
    assert found["longest"][0].lines == ['longest: 4 tokens, train.txt:5: "a b c d"']
    assert found["shortest"][0].lines == ['shortest: 1 token, train.txt:4: "x"']
    assert examine("a b\n", show=0)["sequences"][0].lines == []


def test_tokens_are_counted(examine):
    figures = examine("a a a b\nb c\n")["tokens"][0].figures
    assert figures["frequent"] == [{"token": t, "count": n} for t, n in (("a", 3), ("b", 2), ("c", 1))]
    assert figures["rare"] == []
    letters = "".join(f"{letter} " * (n + 1) for n, letter in enumerate("abcdefghijkl"))
    assert [each["token"] for each in examine(letters)["tokens"][0].figures["rare"]] == list("abcd")
    assert (figures["once"], figures["never"]) == (1, 0)
    assert examine("ab\n", "b\n", "tokenizer.kind=byte")["tokens"][0].figures["never"] == 254


def test_copies_are_counted_and_the_most_frequent_ones_named(examine):
    text = [f"w{n} x" for n in range(70)] + ["same thing"] * 20 + ["other thing"] * 10
    random.Random(1).shuffle(text)
    found = examine("\n".join(text), "w3 x\nnew line\nsame thing\nsame thing\n")
    copies = found["copies"][0]
    assert copies.figures["copies"] == len(text) - len(set(text)) == 28
    assert copies.figures["most_frequent"] == [
        {"text": "same thing", "count": 20},
        {"text": "other thing", "count": 10},
    ]
    assert "28 of 100 training sequences repeat an earlier one (28.0%)" in copies.lines[0]
    shared = found["shared"][0]
    assert (shared.figures["shared"], shared.figures["sequences"]) == (3, 4)
    assert shared.figures["examples"] == ["w3 x", "same thing"]
    unknown = examine("rare1 a\nrare2 a\na\n", "a\n", "tokenizer.min_frequency=2")["copies"][0]
    assert unknown.figures["copies"] == 0
    found = examine("a\nb\n", "c d\n")
    assert found["copies"][0].lines == ["copies: no training sequence occurs twice"]
    assert found["shared"][0].lines == ["in both training and valid: 0 of 1 valid sequences"]


def test_copies_are_those_of_a_plain_count(examine):
    @given(st.lists(st.text("ab ", min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=40))
    def holds(texts):
        figures = examine("\n".join(texts))["copies"][0].figures
        assert figures["copies"] == len(texts) - len(set(texts))

    holds()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("word", [("zebra", 2), ("얼룩말", 1)]),
        ("char", [("z", 2), ("e", 2), ("r", 2), ("얼", 1), ("룩", 1), ("말", 1)]),
    ],
)
def test_unknown_words_or_characters_are_named(examine, kind, wanted):
    found = examine("a b\na b\n", "a zebra 얼룩말\nzebra\n", f"tokenizer.kind={kind}")
    (finding,) = found["unknown"]
    assert finding.figures["store"] == "valid"
    named = [(each["token"], each["count"]) for each in finding.figures["most_frequent"]]
    assert named == wanted
    assert '"zebra" 2' in finding.lines[0] or kind == "char"


def test_unknown_words_are_named_without_the_marks_beside_them(examine):
    found = examine("a b, c\na b, c\n", "a zebra, Zebra.\n", "tokenizer.split=words", "tokenizer.lowercase=true")
    (finding,) = found["unknown"]
    assert [(each["token"], each["count"]) for each in finding.figures["most_frequent"]] == [("zebra", 2), (".", 1)]


TABLES = {
    "csv": ("id,text,stars\n", '{n},"So ""good"", really",5\n', "csv"),
    "plain csv": ("id,text,stars\n", "{n},good film,5\n", "csv"),
    "excel": ("id;text\n", "{n};good film\n", "csv"),
    "tsv": ("id\ttext\n", "{n}\tgood film\n", "tsv"),
    "jsonl": ("", '{{"text": "good film {n}", "stars": 3}}\n', "jsonl"),
    "html": ("<html>\n", "<p class='x'>good film {n}<br />\n", "HTML"),
    "entities": ("", "good &amp; bad {n}\n", "html.unescape"),
    "documents": ("", "good film {n}<|endoftext|>\n", "data.separator"),
    "addresses": ("", "see https://example.org/{n}\n", "web addresses"),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_looks_like_markup_is_said_with_the_way_out(examine, name):
    header, row, word = TABLES[name]
    found = examine(header + "".join(row.format(n=n) for n in range(30)), "a\n", "data.format=text")
    lines = [line for finding in found["markup"] for line in finding.lines]
    assert any(word in line for line in lines), lines
    assert all(line.startswith("looks like markup: ") for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        'He said, "no", and left.\nWell\n"Yes," she said.\n',
        "the <unk> of <unk>\n",
        "one, two\nthree\nfour, five, six\n",
        "3 < 4 and 5 > 4\n",
        "나는 책을 읽었다, 어제.\n그는 갔다.\n오늘, 내일, 모레\n",
    ],
)
def test_plain_text_is_no_markup(text):
    marks = MarkupCount()
    plain = [f"a plain sentence {n}" for n in range(20)]
    marks.add(text.splitlines() + plain)
    assert marks.findings() == []


KINDS = ["word", "char", "byte", "ids", "bpe", "unigram", "file"]
TEXTS = {
    "word": "나는 책 을\n the  cat 😀\n",
    "one": "x",
    "copies": "a b\n" * 9,
    "blank": "\n\n a \n\n",
    "wide": "e\u0301 👩‍👩‍👧 \u202e\x1b[2J | \\ ▁ Ġ\nq\n",
}


@pytest.mark.parametrize("mode", ["sequences", "stream", "carry", "two directions", "fraction"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_no_data_that_trains_is_a_fault(examine, corpus, kind, mode, name):
    text = TEXTS[name]
    if kind == "ids":
        text = "\n".join("3 5 7" if line.strip() else "" for line in text.split("\n"))
    if kind == "file":
        library = train_tokenizer("bpe", ["a b c", "나는 책"], vocab_size=300).library
        library.save(str(corpus / "own.json"))
    overrides = {
        "sequences": ["model.bidirectional=false"],
        "stream": STREAM,
        "carry": ["batching.carry_state=true", "model.bidirectional=false"],
        "two directions": [],
        "fraction": ["data.valid=null", "data.valid_fraction=0.4"],
    }[mode]
    if mode == "fraction":
        text += "\n" + "\n".join("5 7" if kind == "ids" else f"b {n}" for n in range(20))
        if kind == "ids":
            text += "\n" + "\n".join(f"{n} 9" for n in range(1, 20))
    settings = {"ids": ["tokenizer.vocab_size=30"], "file": ["tokenizer.path=own.json"]}.get(kind, [])
    if kind in ("bpe", "unigram"):
        settings = ["tokenizer.vocab_size=300"]
    found = examine(text, "3 5\n", f"tokenizer.kind={kind}", "logging.sample_prompts=[]", *settings, *overrides)
    lines = [line for findings in found.values() for finding in findings for line in finding.lines]
    assert {"sequences", "longest", "shortest", "tokens"} <= set(found)
    assert ("copies" in found) == (mode != "stream")
    assert all("\x1b" not in line and "\n" not in line for line in lines)
    json.dumps([finding.row for findings in found.values() for finding in findings]).encode()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_of_subwords_put_together_are_the_text(kind):
    texts = ["the cat sat on the mat", "나는 책을 읽었다"] * 5
    tokenizer = train_tokenizer(kind, texts, vocab_size=300)
    write = token_writer(tokenizer)
    for text in texts:
        pieces = "".join(map(write, tokenizer.encode(text)))
        raw = pieces.replace("␣", " ").encode("latin-1", "backslashreplace").decode("unicode_escape")
        read = raw.encode("latin-1").decode() if "\\x" in pieces else pieces.replace("␣", " ")
        assert read.strip() == text


def test_bytes_and_characters_are_written_apart():
    write = token_writer(ByteTokenizer())
    assert "|".join(map(write, ByteTokenizer().encode("a 책"))) == "a|␣|\\xec|\\xb1|\\x85"
    tokenizer = CharTokenizer(list("a |\\\t책"))
    assert "|".join(map(token_writer(tokenizer), [*tokenizer.encode("a |\\\t책"), 3])) == "a|␣|\\||\\\\|\\t|책|<unk>"


@given(st.text(), st.integers(1, 30))
def test_a_cut_text_is_a_beginning(text, columns):
    found = cut(text, columns)
    assert found == text or (found.endswith("…") and text.startswith(found[:-1]))
    assert len(found) <= max(columns, 1)


def test_korean_takes_two_columns():
    assert cut("가나다라", 8) == "가나다라"
    assert cut("가나다라", 7) == "가나다…"


def test_large_files_are_examined_by_excerpts_with_places_in_the_files(corpus, monkeypatch):
    monkeypatch.setattr(configuration, "LARGE_BYTES", 100_000)
    monkeypatch.setattr(excerpts, "EXCERPT_BYTES", 64 << 10)
    monkeypatch.setattr(excerpts, "PIECE_BYTES", 4 << 10)
    text = [f"w{n % 97} x" for n in range(40_000)]
    text[0] = "a longest line of all"
    (corpus / "train.txt").write_text("\n".join(text))
    found = {each.about: each for each in describe_configuration(load_config("config.yaml"), print)}
    assert found["longest"].lines == ['in the excerpts: longest: 5 tokens, train.txt:1: "a longest line of all"']
    assert found["sequences"].figures["sequences"][0]["place"] == "train.txt:1"
    assert found["copies"].lines[0].startswith("in the excerpts: copies: ")
    assert found["store"].figures["estimated"] is False  # of valid.txt, which is small


def test_json_has_the_figures_of_the_lines(corpus, shell):
    done = shell("check", "config.yaml", "--json", "--show", 1)
    assert done.returncode == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    about = [row["about"] for row in rows]
    assert about[:4] == ["files", "vocabulary", "store", "store"]
    assert about[-4:] == ["batches", "model", "memory", "time"]
    read = {"format": "text", "why": "by its suffix", "encoding": "utf-8", "details": "each line is a sequence"}
    assert rows[0]["files"] == [{"store": name, "file": f"{name}.txt", **read} for name in ("train", "valid")]
    assert rows[2]["sequences"] == 43
    assert len(rows[about.index("sequences")]["sequences"]) == 1
    first = (corpus / "train.txt").read_text().splitlines()[0]
    assert rows[about.index("sequences")]["sequences"][0]["pieces"] == first.split()
    assert rows[-1]["tokens_per_second"] > 0
    assert shell("check", "config.yaml").stdout.count("\n") <= 25


@pytest.mark.parametrize("name", ["t.txt", "t.fa"])
def test_records_of_a_stream_that_are_longer_than_a_block_are_counted_once(tmp_path, monkeypatch, shell, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    record = "ACGT ACGG " * 60 if name == "t.txt" else ">c\n" + "ACGTACGGA\n" * 60
    Path(name).write_text(f"{record}\n\n" * 5)
    Path("c.yaml").write_text(
        f"data: {{train: {name}, separator: {'paragraph' if name == 't.txt' else 'line'}}}\ntokenizer: {{kind: char}}\n"
        "batching: {mode: stream, batch_size: 2}\nmodel: {embedding_size: 8, hidden_size: 8, num_layers: 1}\n"
    )
    done = shell("check", "c.yaml", "--json", "--show", 5)
    assert done.returncode == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert next(row for row in rows if row["about"] == "store")["sequences"] == 5
    shown = next(row for row in rows if row["about"] == "sequences")["sequences"]
    assert len({each["place"] for each in shown}) == 5
