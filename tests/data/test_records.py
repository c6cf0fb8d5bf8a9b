"""JSON, FASTA and Parquet: what is read is what Python's modules and pyarrow read, wherever blocks are cut."""

import json
import random
import unicodedata
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.store.token_store import open_store
from lmtrain.data.text import reading
from lmtrain.data.text.formats import parquet as parquet_format
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read(path, **more):
    blocks = list(Source((str(path),), **more).blocks())
    return [text for block in blocks for text in block.texts], [line for block in blocks for line in block.lines]


def check_every_cut(path, wanted, block_bytes, **more):
    """Read a file in small blocks, and once more from behind each block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        patch.setattr(parquet_format, "BLOCK_BYTES", block_bytes)
        source = Source((str(path),), **more)
        raws = list(source.raws())
        parsed = [source.sequences(source.parse(raw)).texts for raw in raws]
        assert [text for texts in parsed for text in texts] == wanted
        for number, raw in enumerate(raws):
            after = [source.sequences(source.parse(each)).texts for each in source.raws(0, raw.end, raw.next_line)]
            assert list(chain(*after)) == list(chain(*parsed[number + 1 :]))


def clean(text):
    """What is done to each text of a record, by Python alone."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip("\n")


TEXTS = st.text(
    st.sampled_from(list('ab ",[]{}\\\n한é')) | st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=9
)
WILD_JSON = {
    "case 4": ('[\n {"text": "the cat sat"},\n {"text": "the dog ran"}\n]\n', ["the cat sat", "the dog ran"], [2, 3]),
    "strings": ('["a", "b, c",\n"[d]"]', ["a", "b, c", "[d]"], [1, 1, 2]),
    "pretty": (
        '[\n  {\n    "id": 1,\n    "review": "so \\"good\\"\\n!"\n  },\n'
        '  {\n    "id": 2,\n    "review": null\n  }\n]\n',
        ['so "good"\n!'],
        [2],
    ),
}


@pytest.mark.parametrize("name", WILD_JSON)
@pytest.mark.parametrize("block_bytes", [1 << 18, 1, 5])
def test_json_arrays_as_programs_write_them(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    content, texts, lines = WILD_JSON[name]
    (tmp_path / "t.JSON").write_text(content)
    assert read(tmp_path / "t.JSON") == (texts, lines)


@settings(max_examples=100)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=6),
    indent=st.sampled_from([None, 2]),
    strings=st.booleans(),
    depth=st.sampled_from([0, 3, 9]),
    block_bytes=st.integers(1, 64),
    lines=st.booleans(),
)
def test_json_is_read_as_the_json_module_reads_it(tmp_path_factory, texts, indent, strings, depth, block_bytes, lines):
    folder = tmp_path_factory.mktemp("json")
    more = {"text": [1, "]", []]}
    for _ in range(depth):
        more = {"a": [more, "{"]}
    records = texts if strings else [{"id": 7, "text": text, "more": more} for text in texts]
    wanted = [clean(text) for text in texts]
    if lines:
        (folder / "t.ndjson").write_text("".join(json.dumps(record) + "\n" for record in records))
        check_every_cut(folder / "t.ndjson", wanted, block_bytes, empty="keep")
    else:
        (folder / "t.json").write_text(json.dumps(records, indent=indent, ensure_ascii=False))
        check_every_cut(folder / "t.json", wanted, block_bytes, empty="keep")


JSON_FAULTS = {
    "an object": ("t.json", '{\n "data": [1]\n}\n', {}, r"t\.json:1: an object, not an array; write one of its arrays"),
    "a holder": (
        "t.json",
        '{"v": "1",\n "data": [{"text": "a"}]}',
        {},
        r"t\.json:1: an object.*arrays \('data'\) into",
    ),
    "a holder in a line": ("t.json", '{"v": "1", "data": [{"text": "a"}]}\n', {}, r"t\.json:1: an object.*\('data'\)"),
    "a holder by any name": ("t", '{"v": "1", "data": [{"text": "a"}]}', {}, r"t:1: an object.*\('data'\)"),
    "lines as json": (
        "t.x",
        '{"text": "a"}\n{"text": "b"}\n',
        {"format": "json"},
        r"t\.x:1: JSON lines.*format: jsonl",
    ),
    "array as lines": ("t.x", '[\n{"text": "a"}]\n', {"format": "jsonl"}, r"t\.x:1:2: not JSON.*data\.format: json"),
    "array in a line": ("t.x", '["a"]\n', {"format": "jsonl"}, r"t\.x:1: an array, not a record; data\.format: json"),
    "nothing": ("t.json", "", {}, r"t\.json:1: not a JSON array"),
    "no comma": ("t.json", '["a"\n "b"]', {}, r"t\.json:1:2: a comma is missing behind this element, in '\"a\"'"),
    "two commas": ("t.json", '["a", "b",, "c"]', {}, r"t\.json:1: not JSON: Expecting value, in ', \"c\"]'"),
    "a comma before all": ("t.json", '[,"a"]', {}, r"t\.json:1:2: not JSON: Expecting value"),
    "behind the end": ("t.json", '["a"]\nb', {}, r"t\.json:1: 'b' stands behind the end"),
    "two arrays": ("t.json", '["a",\n"b"]["c", "d"]', {}, r"""t\.json:2: '\["c", "d"\]' stands behind the end"""),
    "not closed": ("t.json", '["a",\n"b"', {}, r"t\.json:2: the array is not closed"),
    "cut behind a comma": ("t.json", '["a",\n', {}, r"t\.json:2: the array is not closed"),
    "cut in a string": ("t.json", '["a",\n"b', {}, r"t\.json:2:1: not JSON: Unterminated string"),
    "a number": ("t.json", '["a",\n 3]', {}, r"t\.json:2:2: neither a text nor an object.*, in '3]'"),
    "null": ("t.json", '["a", null]', {}, r"t\.json:1: neither a text nor an object.*, in 'null]'"),
    "an array in it": ("t.json", '["a",\n["b", "c"],\n"d"]', {}, r"t\.json:2:1: neither a text nor"),
    "a long number": ("t.json", "[" + "9" * 5000 + "]", {}, r"t\.json:1:2: not JSON that can be read.*number too long"),
    "too deep": ("t.json", "[" * 99_999, {}, r"t\.json:1:2: not JSON that can be read: nested too deep"),
    "no such field": (
        "t.json",
        '[\n{"a": "x", "b": "y"}]',
        {"field": "c"},
        r"t\.json:2: no field 'c'.*it has 'a', 'b'",
    ),
    "not in the second": (
        "t.json",
        '[{"a": "x"},\n{"b": "y"}]',
        {},
        r"t\.json:2:1: no field 'a'.*has 'b', in '.\"b\"'?",
    ),
    "which field": ("t.json", '[{"a": "x", "b": "y"}]', {}, r"t\.json:1: which field is the text\?.*'a', 'b'"),
    "which field of lines": ("t.jsonl", '\n\n{"a": "x", "b": "y"}\n', {}, r"t\.jsonl:3: which field is the text\?"),
    "bad": ("t.json", '["a",\n  {"text": ]}]', {}, r"t\.json:2:12: not JSON"),
}


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_a_fault_of_a_json_file_is_named_with_its_place(tmp_path, name):
    file, content, more, said = JSON_FAULTS[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / file, **more)


def test_an_array_that_ends_too_early_is_named_where_other_files_follow(tmp_path):
    (tmp_path / "a.json").write_text('["a", "b",')
    (tmp_path / "b.json").write_text('["c"]')
    with pytest.raises(DataError, match=r"a\.json:1: the array is not closed"):
        list(Source.of([str(tmp_path)]).texts())


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD", "by default"])
def test_a_field_has_its_name_however_that_is_composed(tmp_path, form, asked):
    for name, content in [
        ("t.json", '[{"본문": "가", "n": 1}]'),
        ("t.jsonl", '{"본문": "가", "n": 1}'),
        ("t.csv", "n,본문\n1,가\n"),
    ]:
        (tmp_path / name).write_text(unicodedata.normalize(form, content))
        more = {} if asked == "by default" else {"field": unicodedata.normalize(asked, "본문")}
        assert read(tmp_path / name, **more)[0] == ["가"]


PROTEINS = ">P1 made up\nMAKLWDERTQ\nGHVVSTPLAA\n\n>P2 made up, too\n;a comment\nMSTNPKERRV\nLLGDAAKWQE\n>P3\n"


def test_fasta_records_lose_header_and_wraps(tmp_path):
    (tmp_path / "p.fasta").write_text(PROTEINS)
    wanted = ["MAKLWDERTQGHVVSTPLAA", "MSTNPKERRVLLGDAAKWQE"]
    assert read(tmp_path / "p.fasta") == (wanted, [1, 5])
    for block_bytes in (1, 3, 30, 1000):
        check_every_cut(tmp_path / "p.fasta", [*wanted, ""], block_bytes, empty="keep")
    (tmp_path / "unnamed").write_text(PROTEINS)
    assert Source.of([str(tmp_path / "unnamed")]).understood(str(tmp_path / "unnamed")).format == "fasta"
    (tmp_path / "bad.fa").write_text("ACGT\n>x\nAC\n")
    with pytest.raises(DataError, match=r"bad\.fa:1: text before the first header"):
        read(tmp_path / "bad.fa")


FASTA_LINES = [">h", ">", ">a > b", "AC", "GT", "A C", "  ", "", ";c", "T\t", "*-", "acgt" * 9]


def fasta_by_plain_python(content):
    records = []
    for line in content.split("\n"):
        if line.startswith(">"):
            records.append("")
        elif records and not line.startswith(";"):
            records[-1] += "".join(line.split())
    return records


@settings(max_examples=200)
@given(
    lines=st.lists(st.sampled_from(FASTA_LINES), max_size=25),
    ends=st.sampled_from(["", "\n"]),
    block_bytes=st.integers(1, 64),
)
def test_fasta_is_read_as_python_reads_it(tmp_path_factory, lines, ends, block_bytes):
    folder = tmp_path_factory.mktemp("fasta")
    content = "\n".join([">first", *lines]) + ends
    wanted = fasta_by_plain_python(content)
    (folder / "t.fna").write_text(content)
    check_every_cut(folder / "t.fna", wanted, block_bytes, empty="keep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        store = open_store(Source((str(folder / "t.fna"),), stream=True), ByteTokenizer(), folder / "cache")
    assert store.tokens.tolist() == [token for each in wanted for token in [*(ord(base) + 4 for base in each), 2]]


@pytest.mark.parametrize("block_bytes", [1 << 18, 7, 61, 500])
@pytest.mark.parametrize("end", ["\n", "\n\n", "\n \n", "\n;end\n"])
def test_a_chromosome_in_a_stream_has_one_end_token(tmp_path, monkeypatch, block_bytes, end):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    draw = random.Random(5)
    bases = ["".join(draw.choices("ACGT", k=size)) for size in (3000, 10, 1, 777)]
    lines = [f">c{n}\n" + "\n".join(each[k : k + 60] for k in range(0, len(each), 60)) for n, each in enumerate(bases)]
    (tmp_path / "dna.fa").write_text(end.join(lines) + end)
    store = open_store(
        Source((str(tmp_path / "dna.fa"),), stream=True), ByteTokenizer(), tmp_path / f"cache{block_bytes}"
    )
    assert store.tokens.tolist() == [token for each in bases for token in [*(ord(base) + 4 for base in each), 2]]
    assert store.offsets.tolist() == [0, 3001, 3012, 3014, 3792]


@settings(max_examples=60)
@given(
    texts=st.lists(st.none() | TEXTS, min_size=1, max_size=12),
    group=st.integers(1, 5),
    dictionary=st.booleans(),
    block_bytes=st.integers(1, 64),
)
def test_parquet_is_read_as_pyarrow_reads_it(tmp_path_factory, texts, group, dictionary, block_bytes):
    path = tmp_path_factory.mktemp("parquet") / "t.parquet"
    column = pyarrow.array(texts, pyarrow.string())
    column = column.dictionary_encode() if dictionary else column
    table = pyarrow.table({"id": list(range(len(texts))), "content": column, "label": ["x"] * len(texts)})
    parquet.write_table(table, path, row_group_size=group)
    wanted = [clean(text or "") for text in parquet.read_table(path)["content"].to_pylist()]
    check_every_cut(path, wanted, block_bytes, empty="keep")


def test_faults_of_parquet_files(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"a": ["x"] * 9, "b": ["y"] * 9, "n": list(range(9))}), path)
    for field, said in [
        ("text", "t.parquet: which field is the text.*'a', 'b'"),
        ("c", "t.parquet: no field 'c'.*'a', 'b', 'n'"),
        ("n", "t.parquet: column 'n' holds int64, not text"),
    ]:
        with pytest.raises(DataError, match=said):
            read(path, field=field)
    with pytest.raises(DataError, match=r"t\.parquet: a Parquet file; data\.format: parquet"):
        read(path, format="text")
    parquet.write_table(pyarrow.table({"a": ["x", "y\0"]}), path)
    with pytest.raises(DataError, match=r"t\.parquet:2: a NUL character in column 'a'"):
        read(path)
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:4] + whole[30:], b"PAR1", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.parquet: broken Parquet file: "):
            read(path)
    path.write_bytes(b"PARE" + whole[4:-4] + b"PARE")
    with pytest.raises(DataError, match=r"t\.parquet: "):
        read(path)
