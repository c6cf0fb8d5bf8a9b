"""Plain text: what ends a sequence, line ends, encodings, packed files, directories, a stream's long lines."""

import bz2
import gzip
import lzma
import re
import unicodedata

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmtrain.data.store.token_store import open_store
from lmtrain.data.text import reading
from lmtrain.data.text.encodings import likely_encoding
from lmtrain.data.text.formats import base
from lmtrain.data.text.formats import text as text_format
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.errors import DataError

PARTS = [
    "a",
    "b c",
    " ",
    "  ",
    "\n",
    "\n",
    "\r\n",
    "\r",
    "\r\r\n",
    "한국",
    "e\u0301",
    "%%",
    "<|end|>",
    "끝",
    "%",
    "\t",
    "\u3000",
    "e",
    "가",
    "x y z",
    *(unicodedata.normalize("NFD", text) for text in ("가", "각", "끝")),
]
CONTENTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def with_newlines(content):
    return re.sub("\r\r\n|\r\n|\r", "\n", content)


def plainly(content, separator):
    """The texts of a file by Python's own means, blank ones included."""
    text = unicodedata.normalize("NFC", with_newlines(content))
    if separator == "line":
        return text.removesuffix("\n").split("\n") if text else []
    if separator == "file":
        return [text.strip("\n")] if text.strip("\n") else []
    if separator == "paragraph":
        paragraphs, lines = [], []
        for line in [*text.split("\n"), ""]:
            if line.strip():
                lines.append(line)
            elif lines:
                paragraphs.append("\n".join(lines))
                lines = []
        return paragraphs
    texts = [part.strip("\n") for part in text.split(unicodedata.normalize("NFC", separator))]
    return texts if texts[-1] else texts[:-1]


OWN = ["%%", "<|end|>", "끝", "\n%\n", "가", "e", "x y z", unicodedata.normalize("NFD", "끝")]


@settings(max_examples=400)
@given(
    content=CONTENTS,
    separator=st.sampled_from(["line", "paragraph", "file", *OWN]),
    block_bytes=st.integers(1, 64),
    empty=st.sampled_from(["skip", "keep"]),
)
def test_plain_text_is_cut_as_python_cuts_it(tmp_path_factory, content, separator, block_bytes, empty):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_bytes(content.encode())
    wanted = [text for text in plainly(content, separator) if empty == "keep" or text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        source = Source((str(path),), separator=separator, empty=empty)
        if separator not in ("line", "paragraph", "file") and content and len(plainly(content + "x", separator)) < 2:
            with pytest.raises(DataError, match="never occurs"):
                list(source.texts())
            return
        raws = list(source.raws())
        parsed = [source.sequences(source.parse(raw)) for raw in raws]
        assert [text for block in parsed for text in block.texts] == wanted
        lines = with_newlines(content).split("\n")
        for block in parsed:
            for number, text in zip(block.lines, block.texts, strict=True):
                if first := text.split("\n")[0]:
                    assert first in unicodedata.normalize("NFC", lines[number - 1])
        for number, raw in enumerate(raws):  # continued behind each block
            after = [source.sequences(source.parse(each)).texts for each in source.raws(0, raw.end, raw.next_line)]
            assert [text for texts in after for text in texts] == [
                text for block in parsed[number + 1 :] for text in block.texts
            ]


def test_poems_have_their_lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n\nroses are red\nviolets are blue\n \n\n\nthe sea\n  is wide\n\n")
    (block,) = Source((str(path),), separator="paragraph").blocks()
    assert (block.texts, block.lines) == (["roses are red\nviolets are blue", "the sea\n  is wide"], [3, 8])


@settings(max_examples=60)
@given(
    words=st.lists(st.sampled_from(["ab", "c", "한국어", "e\u0301", "", "x,y"]), min_size=1, max_size=60),
    ends=st.sampled_from(["", "\n", " \n\n"]),
    separator=st.sampled_from(["line", "paragraph", "file", "ab c", "c ab x,y", "어", "e"]),
    block_bytes=st.integers(1, 40),
)
@pytest.mark.parametrize("kind", ["byte", "char", "word", "words"])
def test_a_stream_has_the_same_tokens_wherever_long_lines_are_cut(
    tmp_path_factory, kind, words, ends, separator, block_bytes
):
    assume("".join(words))
    assume(separator in ("line", "paragraph", "file") or len(plainly(" ".join(words) + "x", separator)) > 1)
    folder = tmp_path_factory.mktemp("stream")
    (folder / "t.txt").write_text(" ".join(words) + ends)
    source = Source((str(folder / "t.txt"),), separator=separator, stream=True)
    split = {"split": "words"} if kind == "words" else {}
    made_of = train_tokenizer(kind.removesuffix("s"), [*source.texts(), "x"], vocab_size=999, **split)
    whole = open_store(source, made_of, folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        cut = open_store(source, made_of, folder / "cut")
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.offsets.tolist() == whole.offsets.tolist()
    assert cut.counts.characters == whole.counts.characters


@pytest.mark.parametrize("text", ["a a" + "학교" * 300, "한" * 400, "abc" * 300, "的" * 30 + "e\u0301xy" * 300])
def test_a_stream_reads_a_line_without_spaces_of_any_length(tmp_path, monkeypatch, text):
    (tmp_path / "t.txt").write_text(text)
    source = Source((str(tmp_path / "t.txt"),), stream=True)
    made_of = train_tokenizer("char", [text], vocab_size=99)
    whole = open_store(source, made_of, tmp_path / "whole")
    monkeypatch.setattr(reading, "BLOCK_BYTES", 50)
    for module in (base, text_format):
        monkeypatch.setattr(module, "LONGEST_RECORD_BYTES", 200)
    assert len(list(source.raws())) > 1
    assert open_store(source, made_of, tmp_path / "cut").tokens.tolist() == whole.tokens.tolist()


@pytest.mark.parametrize("kind", ["byte", "char", "word"])
def test_empty_lines_are_sequences_where_they_are_kept(tmp_path, kind):
    path = tmp_path / "t.txt"
    path.write_text("ab\n\n\nc\n\n")
    made_of = train_tokenizer(kind, ["ab", "c"], vocab_size=99)
    first, second = made_of.encode("ab"), made_of.encode("c")
    kept = open_store(Source((str(path),), empty="keep"), made_of, tmp_path / "cache")
    assert kept.tokens.tolist() == [1, *first, 2, 1, 2, 1, 2, 1, *second, 2, 1, 2]
    assert (kept.counts.sequences, kept.counts.blank) == (5, 0)
    skipped = open_store(Source((str(path),)), made_of, tmp_path / "cache")
    assert skipped.tokens.tolist() == [1, *first, 2, 1, *second, 2]
    assert (skipped.counts.sequences, skipped.counts.blank) == (2, 3)
    path.write_text("".join(f"{n % 7 * 'x'}\n" for n in range(70)))
    parts = [list(Source((str(path),), empty="keep", part=p, valid_fraction=0.5).texts()) for p in ("train", "valid")]
    assert sorted(parts[0] + parts[1]) == sorted(n % 7 * "x" for n in range(70))


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("named", [True, False])
def test_packed_files_are_unpacked_and_a_broken_one_is_named(tmp_path, suffix, named):
    lines = [f"line {n} 한" for n in range(90_000)]
    path = tmp_path / (f"t.TXT.{suffix.upper()}" if named else "t.txt")  # by its suffix, or by its first bytes
    packed = PACKERS[suffix]("".join(f"{line}\n" for line in lines[:60_000]).encode())
    rest = PACKERS[suffix]("".join(f"{line}\n" for line in lines[60_000:]).encode())
    path.write_bytes(packed + rest)
    source = Source((str(path),))
    assert list(source.texts()) == lines
    raws = list(source.raws())
    assert source.parse(next(source.raws(0, raws[1].end, raws[1].next_line))).texts[0] == source.parse(raws[2]).texts[0]
    path.write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"broken (gzip|bzip2|xz|zstd) file"):
        list(source.texts())


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "utf-16-be", "cp1252", "shift_jis", "utf-8-sig"])
def test_encodings(tmp_path, encoding):
    lines = (
        ["Mädchen", "x"] if encoding == "cp1252" else ["日本", "カナ"] if encoding == "shift_jis" else ["고양이", "가"]
    )
    path = tmp_path / "t.txt"
    path.write_bytes("\r\n".join([*lines * 50_000, "z"]).encode(encoding))
    source = Source((str(path),), encoding=encoding)
    assert list(source.texts()) == [*lines * 50_000, "z"]
    raws = list(source.raws())
    assert source.parse(next(source.raws(0, raws[0].end, raws[0].next_line))).texts == source.parse(raws[1]).texts
    if encoding in ("utf-16", "utf-8-sig"):  # known by their marks
        assert next(Source((str(path),)).texts()) == lines[0]
    else:
        with pytest.raises(DataError, match=r"t\.txt:1:\d: (not UTF-8|a NUL)"):
            list(Source((str(path),)).texts())


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp949", "영화 정말 재미있게 봤습니다. 배우들의 연기도 좋았어요.\n"),
        ("cp1252", "Das Mädchen läuft über die Straße.\n"),
        ("cp1251", "Привет, как дела? Это тест.\n"),
        ("gb18030", "我是一个学生。今天天气很好。\n"),
        ("utf-16-le", "the cat sat\n"),
        ("utf-16-be", "the cat sat\n"),
    ],
)
def test_the_likely_encoding_is_named_with_how_it_reads(encoding, text):
    data = text.encode(encoding) * 5
    place = next(place for place, byte in enumerate(data) if byte > 127 or byte == 0)
    said = likely_encoding(data, place)
    assert said.startswith(f"it reads as {text.strip()[:30]!r} in {encoding}")
    assert said.endswith(f"; set data.encoding: {encoding}")


def test_a_directory_is_all_files_below_it_with_a_known_suffix(tmp_path):
    for name, content in [
        ("b.txt", "b\n"), ("a/c.JSONL", '{"text": "c"}\n'), ("a/d.csv", "text\nd\n"), ("a/photo.png", "x"),
        (".hidden.txt", "x\n"), (".git/e.txt", "x\n"), ("a/f.txt.gz", None),
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"f\n") if content is None else content.encode())
    source = Source.of([str(tmp_path), str(tmp_path / "b.txt")])
    assert list(source.texts()) == ["c", "d", "f", "b"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none'}: no file below this directory has a known")):
        Source.of([str(tmp_path / "none")])


def test_one_of_several_files_may_lack_the_separator(tmp_path):
    for name, content in [("a.txt", "one\ntwo\n%%\nthree\n"), ("b.txt", "four\n")]:
        (tmp_path / name).write_text(content)
    assert list(Source.of([str(tmp_path)], separator="%%").texts()) == ["one\ntwo", "three", "four"]
    with pytest.raises(DataError, match=r"b\.txt: the separator '%%' never occurs"):
        list(Source.of([str(tmp_path / "b.txt")], separator="%%").texts())
    assert list(Source.of([str(tmp_path / "b.txt")], separator="%%", may_be_one=True).texts()) == ["four"]
    (tmp_path / "p.txt").write_text("PARENTS: a\nustar\n")  # these begin like files of other kinds
    assert list(Source.of([str(tmp_path / "p.txt")]).texts()) == ["PARENTS: a", "ustar"]
