"""File formats: records that end elsewhere than at a newline fit in, block by block, also when a build is continued."""

import json
from pathlib import Path

import pytest

from lmtrain.data.store import build as building
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text import excerpts, reading
from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.table import FORMATS, resolve_format
from lmtrain.data.text.kinds import SUFFIXES
from lmtrain.data.text.reading import Block, decode
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import DataError


class Sections(Format):
    """Records end with a line of one `%`, and may have several lines; the file's first line is put before each."""

    def record_end(self, data):
        return max(0, data.rfind(b"\n%\n") + 3) if b"\n%\n" in data else 0

    def header(self, path):
        return Path(path).read_text().partition("\n")[0]

    def parse(self, raw):
        lines, texts, line = [], [], raw.first_line
        for record in decode(raw).removesuffix("%\n").split("\n%\n"):
            lines.append(line)
            texts.append(f"{raw.header}:{' '.join(record.split())}")
            line += record.count("\n") + 2
        return Block(raw.path, lines, texts)


@pytest.fixture
def sections(monkeypatch, tmp_path):
    """A source of thirty records of several lines, each with its line, and the texts that it should have."""
    monkeypatch.setitem(FORMATS, "sections", Sections)
    monkeypatch.setitem(SUFFIXES, ".sections", "sections")
    monkeypatch.setattr(reading, "BLOCK_BYTES", 13)
    records = ["h"] + [f"{number}\n" + "5 % 6\n" * (number % 4) + "7" for number in range(30)]
    path = tmp_path / "t.sections"
    path.write_text("".join(f"{record}\n%\n" for record in records))
    lines = [1 + sum(record.count("\n") + 2 for record in records[:number]) for number in range(len(records))]
    return Source((str(path),)), [f"h:{' '.join(record.split())}" for record in records], lines


def test_records_of_several_lines_keep_their_texts_and_lines(sections):
    source, texts, lines = sections
    blocks = list(source.blocks())
    assert len(blocks) > 15
    assert [text for block in blocks for text in block.texts] == texts
    assert [line for block in blocks for line in block.lines] == lines


def test_a_fault_in_a_record_is_named_with_the_line_that_it_begins_in(sections, tmp_path):
    source, _, lines = sections
    with pytest.raises(DataError, match=rf"t\.sections:{lines[0]}:1: 'h:h' is not an id"):
        open_store(source, IdsTokenizer(10, 0), tmp_path / "cache")


def test_a_build_of_records_of_several_lines_is_continued(sections, tmp_path, monkeypatch):
    source, texts, _ = sections
    monkeypatch.setattr(building, "SAVE_BYTES", 1)

    def stop(what, done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(source, ByteTokenizer(), tmp_path / "cache", watch=stop)
    store = open_store(source, ByteTokenizer(), tmp_path / "cache")
    assert store.was_continued
    decoded = [
        ByteTokenizer().decode(store.tokens[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    ]
    assert decoded == texts


def test_excerpts_of_records_that_are_not_lines_are_whole_records(sections, small, monkeypatch):
    source, texts, _ = sections
    monkeypatch.setattr(excerpts, "PIECE_BYTES", 100)
    monkeypatch.setattr(excerpts, "EXCERPT_BYTES", 400)
    config = small("data.valid=null")
    data = config.data.model_copy(update={"format": "sections", "train": list(source.files)})
    with excerpts.excerpts_of(config.model_copy(update={"data": data})) as taken:
        (file,) = taken.config.data.train
        found = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
        assert found == texts[: len(found)]
        assert 5 < len(found) < len(texts)
        whole = sum(len(json.dumps({"text": text})) + 1 for text in texts)
        assert taken.of["train"].all_bytes == pytest.approx(whole, rel=0.2)


def test_every_format_can_be_named_in_a_configuration(small):
    for name in FORMATS:
        kind = ["tokenizer.kind=ids", "logging.sample_prompts=[]"] if name == "ids" else []
        assert small(f"data.format={name}", *kind).data.format == name


def test_a_suffix_in_any_case_names_the_format():
    named = {"a.jsonl": "jsonl", "b.JSONL.gz": "jsonl", "c.ndjson": "jsonl", "d.Txt.xz": "text", "e.CSV": "csv"}
    assert {path: resolve_format(path, "auto") for path in named} == named
