"""CSV and TSV: what is read is what Python's csv module reads, wherever blocks are cut, and faults have their place."""

import csv
import io
import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmtrain.data.text import reading
from lmtrain.data.text.formats import columns
from lmtrain.data.text.formats.columns import cut_column, rows_end
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.errors import DataError

EXCEL = '\ufeffsep=;\r\nNr;Satz;Note\r\n1;"Ein Hund; er bellt";gut\r\n2;Zwei;\r\n3;"sagt ""ja""\r\nund geht";gut\r\n'
PANDAS = ',review,stars\n0,so good,5\n1,"not bad, not good",3\n2,"two\nlines",4\n3,,1\n'
REVIEWS = 'id\tdocument\tlabel\n1\t"좋아요 정말\t1\n2\t\t0\n3\t그냥 "그래" 요\t1\n4\t끝"\t0\n'
WILD = {
    "Excel": ("t.csv", EXCEL, ["Ein Hund; er bellt", "Zwei", 'sagt "ja"\nund geht'], [3, 4, 5], "Satz"),
    "pandas": ("t.csv", PANDAS, ["so good", "not bad, not good", "two\nlines"], [2, 3, 4], "text"),
    "reviews": ("t.TSV", REVIEWS, ['"좋아요 정말', '그냥 "그래" 요', '끝"'], [2, 4, 5], "text"),
    "one column": ("t.csv", "text\na b\n\nc\n", ["a b", "c"], [2, 4], "text"),
    "bars": ("t.csv", "id|text\n1|a, b\n2|c; d\n", ["a, b", "c; d"], [2, 3], "text"),
    "no header": ("t.csv", "1,a b,x\n2,c d,y\n", ["a b", "c d"], [1, 2], "2"),
}


def read(path, **more):
    blocks = list(Source((str(path),), **more).blocks())
    return [text for block in blocks for text in block.texts], [line for block in blocks for line in block.lines]


@pytest.mark.parametrize("name", WILD)
@pytest.mark.parametrize("block_bytes", [1 << 18, 1, 7])
def test_tables_as_programs_write_them(tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    file, content, texts, lines, field = WILD[name]
    (tmp_path / file).write_bytes(content.encode())
    assert read(tmp_path / file, field=field) == (texts, lines)


CELLS = st.text(
    st.sampled_from(list('ab1 ,;\t|"\n가')) | st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=9
)


@settings(max_examples=150)
@given(
    cells=st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    block_bytes=st.integers(1, 64),
    empty=st.sampled_from(["skip", "keep"]),
)
def test_a_table_is_read_as_the_csv_module_reads_it(
    tmp_path_factory, cells, delimiter, quoting, end, block_bytes, empty
):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    content = io.StringIO()
    writer = csv.writer(content, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(["id", "text", "label"])
    writer.writerows(cells)
    path.write_bytes(content.getvalue().encode())
    table = list(csv.DictReader(io.StringIO(content.getvalue().replace(end, "\n")), delimiter=delimiter))
    wanted = [unicodedata.normalize("NFC", row["text"]).strip("\n") for row in table]
    wanted = [text for text in wanted if empty == "keep" or text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block_bytes)
        source = Source((str(path),), empty=empty)
        raws = list(source.raws())
        assert [text for raw in raws for text in source.sequences(source.parse(raw)).texts] == wanted
        for number, raw in enumerate(raws):  # continued behind each block
            later = [after._replace(read_bytes=0, last=False) for after in source.raws(0, raw.end, raw.next_line)]
            parsed = [text for after in later for text in source.sequences(source.parse(after)).texts]
            assert parsed == [
                text for after in raws[number + 1 :] for text in source.sequences(source.parse(after)).texts
            ]


SIGNS = st.text(st.sampled_from('a,"\né'), max_size=12)


@settings(max_examples=500)
@given(text=SIGNS, column=st.integers(0, 2))
@example(text='"a""b",a\n"",""""\n', column=1)
def test_a_column_that_is_cut_at_once_is_that_of_the_csv_module(text, column):
    rows = list(csv.reader(io.StringIO(text, newline="\n")))
    width = max(map(len, rows), default=1)
    cut = cut_column(RawBlock("t", 5, 0, text.encode(), 0, 0), ",", min(column, width - 1), width, True)
    if cut is not None and rows:
        assert cut.texts == [row[min(column, width - 1)].strip("\n") if row else "" for row in rows]


@given(rows=st.lists(st.lists(SIGNS, min_size=2, max_size=2), min_size=1, max_size=5), end=st.sampled_from(["", "\n"]))
def test_every_regular_table_is_cut_at_once(rows, end):
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows(rows)
    text = content.getvalue().removesuffix("\n") + end
    cut = cut_column(RawBlock("t", 5, 0, text.encode(), 0, 0), ",", 1, 2, True)
    assert cut is not None
    assert cut.texts == [row[1].strip("\n") for row in rows]
    before = ["\n".join(map(",".join, rows[:row])).count("\n") + (row > 0) for row in range(len(rows))]
    assert list(cut.lines) == [5 + lines for lines in before]


@settings(max_examples=500)
@given(text=SIGNS)
def test_rows_end_in_the_same_place_however_their_quotes_are_found(text):
    end = rows_end(text.encode(), ",")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_regular_quotes", lambda flat, delimiter: None)
        assert end == rows_end(text.encode(), ",")
    reader = csv.reader(io.StringIO(text.encode()[:end].decode() + "x", newline="\n"))
    assert list(reader)[-1] == ["x"]


FAULTS = {
    "no such column": ("id,body\n1,a\n", {"field": "b"}, r"t\.csv:1: no field 'b'.*it has 'id', 'body'"),
    "which column": ("a,b\nx,y\n", {}, r"t\.csv:1: which field is the text\? Set data\.field to one of 'a', 'b'"),
    "too few cells": ("id,text\n1,a\n2\n", {}, r"t\.csv:3: a row of 1 cell, and the first row has 2"),
    "too many cells": ('id,text\n1,"a\nb"\n2,a,b\n', {}, r"t\.csv:4: a row of 3 cells, and the first row has 2"),
    "empty": ("", {}, r"t\.csv: an empty table"),
    "column 9": ("1,a\n", {"field": "9"}, r"t\.csv:1: no column 9 \(data\.field\); the first row has 2 cells"),
    "not UTF-8": (
        b"id,text\n1,caf\xe9 au lait\n",
        {},
        r"t\.csv:2:6: not UTF-8 \(byte 0xe9\).*'1,café au lait' in cp1252",
    ),
    "separator": ("id,text\n1,a\n", {"separator": "paragraph"}, r"t\.csv: data\.separator 'paragraph' goes with plain"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_table_is_named_with_its_place(tmp_path, name):
    content, more, said = FAULTS[name]
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        read(tmp_path / "t.csv", **more)


def test_an_unclosed_quote_at_the_end_of_much_text_is_named_where_it_opens(tmp_path):
    path = tmp_path / "t.csv"
    with open(path, "w") as handle:
        handle.write("id,text\n")
        for _ in range(20):
            handle.write('1,"a ""b"" c"\n' * 10_000)
        handle.write('2,"never closed\n')
        handle.writelines(["3,a\n" * (1 << 18)] * 17)
    with pytest.raises(DataError, match=r"t\.csv:200002: the row that begins here has more than 16 MiB; is a quote"):
        read(path)


def test_what_is_said_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("id;text\n1;a\n")
    understood = Source.of([str(tmp_path / "t.csv")]).understood(str(tmp_path / "t.csv"))
    assert understood.details == "cells between ';', also in quotes; column 'text' of 'id', 'text'"
    assert re.fullmatch(r".*t\.csv: csv \(by its suffix\), utf-8, cells .*", str(understood))
