"""What users of such tools reported about their data, as commands; the numbers are those of the list of cases."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

TINY = """
data: {train: my.txt}
tokenizer: {kind: char, min_frequency: 1}
batching: {batch_size: 8}
model: {cell: lstm, embedding_size: 32, hidden_size: 64, num_layers: 1, dropout: 0.0}
optimizer: {lr: 0.01}
schedule: {name: constant, warmup_steps: 10}
training: {max_epochs: 20, precision: fp32, num_threads: 1, device: cpu}
logging: {sample_prompts: []}
"""


@pytest.fixture
def lmtrain(tmp_path, monkeypatch, shell):
    """Run a command in a folder with tiny.yaml; gives its exit code, and what it said on both outputs."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)

    def run(*arguments):
        done = shell(*arguments)
        return done.returncode, done.stdout, done.stderr

    return run


def written(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"data.train={name}"


def sequences(said):
    return json.loads(next(line for line in said.splitlines() if '"about": "store"' in line))["sequences"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\r\r\n"])
def test_case_1_line_ends(lmtrain, end):
    text = written("cr.txt", "".join(f"{line}{end}" for line in ("the cat sat", "the dog ran", "a bird flew", "a b")))
    code, out, _ = lmtrain("check", "tiny.yaml", text, "--json")
    assert (code, sequences(out)) == (0, 4)
    assert "\\r" not in out


ENCODED = {
    "latin1": ("café au lait\n".encode("latin-1"), "cp1252", "café au lait"),
    "cp949": ("고양이가 잔다\n강아지가 뛴다\n".encode("cp949"), "cp949", "고양이가 잔다"),
    "u16le": ("the cat sat\n".encode("utf-16-le"), "utf-16-le", "the cat sat"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_case_2_an_encoding_is_named_and_can_be_set(lmtrain, name):
    content, encoding, reads = ENCODED[name]
    text = written("t.txt", content)
    code, _, said = lmtrain("check", "tiny.yaml", text)
    assert (code, said.count("\n")) == (3, 1)
    assert said.startswith("t.txt:1:")
    assert f"'{reads}' in {encoding}" in said
    assert said.endswith(f"set data.encoding: {encoding}\n")
    assert lmtrain("check", "tiny.yaml", text, f"data.encoding={encoding}")[0] == 0


def test_case_2_utf_16_is_known_by_its_mark_and_a_wrong_encoding_is_refused(lmtrain):
    text = written("u16.txt", "the cat sat\n".encode("utf-16"))
    code, out, _ = lmtrain("check", "tiny.yaml", text)
    assert (code, out.splitlines()[0]) == (0, "u16.txt: text (by its suffix), utf-16, each line is a sequence")
    text = written("t.txt", "the cat\n고양이\n".encode("cp949"))
    code, _, said = lmtrain("check", "tiny.yaml", text, "data.encoding=ascii")
    assert (code, said.partition(" ")[0]) == (3, "t.txt:2:")
    code, _, said = lmtrain("check", "tiny.yaml", text, "data.encoding=cp9499")
    assert code == 2
    assert "not an encoding that Python knows" in said


def test_case_3_a_table(lmtrain):
    text = written(
        "t.csv", 'id,text,label\n1,"the cat sat, and slept",calm\n2,"she said ""run""",wild\n3,"two\nlines",x\n'
    )
    code, out, said = lmtrain("check", "tiny.yaml", text, "--json")
    assert (code, sequences(out)) == (0, 3)
    assert (
        "note: t.csv is read as csv: cells between ',', also in quotes; column 'text' of 'id', 'text', 'label'" in said
    )
    shown = next(json.loads(line) for line in out.splitlines() if '"about": "sequences"' in line)["sequences"]
    assert ["".join(each["pieces"]).replace("␣", " ").replace("\\n", "\n") for each in shown] == [
        "the cat sat, and slept",
        'she said "run"',
        "two\nlines",
    ]


def test_case_4_arrays_and_lines_of_json(lmtrain):
    for name, content, count in [
        ("t.json", '[\n {"text": "the cat sat"},\n {"text": "the dog ran"}\n]\n', 2),
        ("t.ndjson", '{"text": "the cat sat"}\n', 1),
        ("T.JSONL", '{"text": "the cat sat"}\n', 1),
    ]:
        code, out, _ = lmtrain("check", "tiny.yaml", written(name, content), "--json")
        assert (code, sequences(out)) == (0, count)
    code, _, said = lmtrain("check", "tiny.yaml", "data.train=t.json", "data.format=jsonl")
    assert (code, said) == (3, "t.json:1:2: not JSON: Expecting value; is it an array? data.format: json reads one\n")


def test_case_5_one_enormous_line(lmtrain):
    text = written("line.txt", "the small cat sleeps on the warm stone " * 450_000)
    code, out, _ = lmtrain("prepare", "tiny.yaml", text, "batching.mode=stream", "--json")
    assert (code, json.loads(out)["tokens"]) == (0, 17_550_000)
    code, _, said = lmtrain("prepare", "tiny.yaml", text)
    assert code == 3
    assert "more than 16 MiB; cut it into several, or read the text with batching.mode: stream" in said
    row = written("row.txt", "word " * 3000 + "\n")
    code, out, _ = lmtrain("check", "tiny.yaml", row, "tokenizer.kind=word", "batching.max_length=512")
    assert (code, "1 sequences split" in out) == (0, True)


def test_case_6_proteins(lmtrain):
    text = written("p.fasta", ">P1 made up\nMAKLWDERTQ\nGHVVSTPLAA\n>P2 made up, too\nMSTNPKERRV\nLLGDAAKWQE\n")
    code, out, _ = lmtrain("check", "tiny.yaml", text)
    assert code == 0
    assert "train: 2 sequences, 42 tokens with end tokens, longest 20, 0.00% unknown" in out.splitlines()


def test_case_7_decomposed_hangul(lmtrain):
    text = "\n".join(["고양이가 잔다", "강아지가 뛴다", "고양이가 뛴다"] * 40) + "\n"
    composed = lmtrain("prepare", "tiny.yaml", written("nfc.txt", text), "--json")[1]
    decomposed = lmtrain("prepare", "tiny.yaml", written("nfd.txt", unicodedata.normalize("NFD", text)), "--json")[1]
    first, second = json.loads(composed), json.loads(decomposed)
    assert {key: first[key] for key in first if key != "directory"} == {
        key: second[key] for key in second if key != "directory"
    }


def test_case_8_white_space_that_is_folded_is_no_text(lmtrain):
    rows = [[*["ab", "ba", "cc", "da"][k % 4 :], "ab"] for k in range(40)]
    written("narrow.txt", "".join(" ".join(row) + "\n" for row in rows))
    written("wide.txt", "".join("        " + "    ".join(row) + "\n" for row in rows))
    assert lmtrain("train", "tiny.yaml", "data.train=narrow.txt", "tokenizer.kind=word", "training.max_steps=5")[0] == 0
    narrow, wide = (
        json.loads(lmtrain("evaluate", "runs/tiny", f"{name}.txt", "--json")[1]) for name in ("narrow", "wide")
    )
    assert narrow == wide
    again = subprocess.run(
        [sys.executable, "-m", "lmtrain", "evaluate", "runs/tiny", "-", "--json"],
        input=Path("wide.txt").read_bytes(),
        capture_output=True,
    )
    assert json.loads(again.stdout) == wide


def test_case_21_poems(lmtrain):
    poems = "roses are red\nviolets are blue\n\nthe sea is wide\nthe sky is too\n\n" * 40
    text = written("poems.txt", poems)
    code, out, _ = lmtrain("check", "tiny.yaml", text, "data.separator=paragraph", "--json")
    assert (code, sequences(out)) == (0, 80)
    steps = ["training.max_epochs=12", "data.separator=paragraph"]
    for kind in (["char"], ["word"], ["word", "tokenizer.split=words"]):
        name = "-".join(kind)[:4] + str(len(kind))
        assert (
            lmtrain("train", "tiny.yaml", text, f"tokenizer.kind={kind[0]}", *kind[1:], *steps, f"name={name}")[0] == 0
        )
        code, out, _ = lmtrain("generate", f"runs/{name}", "--prompt", "roses are red\n", "--json")
        assert json.loads(out)["text"] == "roses are red\nviolets are blue"
    Path("prompts.jsonl").write_text(json.dumps({"text": "the sea is wide\nthe"}) + "\n")
    code, out, _ = lmtrain("generate", "runs/word1", "--prompts", "prompts.jsonl", "--json")
    assert json.loads(out)["text"] == "the sea is wide\nthe sky is too"
    wanted = lmtrain("score", "runs/char1", "poems.txt")
    again = subprocess.run(
        [sys.executable, "-m", "lmtrain", "score", "runs/char1", "-"],
        input=Path("poems.txt").read_bytes(),
        capture_output=True,
    )
    assert (again.stdout.decode(), again.stdout.count(b"\n")) == (wanted[1], 80)


def test_case_22_words_and_marks(lmtrain):
    lines = 'The cat sat. The dog ran!\n"Run," said the cat.\nthe cat ran, the dog sat.\n' * 20
    text = written("punct.txt", lines)
    more = ["tokenizer.kind=word", "tokenizer.split=words", "tokenizer.lowercase=true", "training.max_epochs=12"]
    assert lmtrain("train", "tiny.yaml", text, *more)[0] == 0
    tokens = json.loads(Path("runs/tiny/tokenizer.json").read_text())["tokens"]
    assert {" cat", ".", ",", " the"} <= set(tokens)
    code, out, said = lmtrain("generate", "runs/tiny", "--prompt", "THE cat", "--json")
    assert code == 0
    assert "unknown" not in said
    assert json.loads(out)["completion"] in (" sat. the dog ran!", " ran, the dog sat.")


def test_case_27_a_file_that_is_named_twice_is_said_to_be_read_once(lmtrain):
    written("a.txt", "the cat\nthe dog\n")
    for named in ("data.train=[a.txt, a.txt]", "data.train=[a.txt, 'a*.txt']"):
        code, out, said = lmtrain("check", "tiny.yaml", named, "--json")
        assert (code, sequences(out)) == (0, 2)
        assert "note: a.txt: named more than once, and read once" in said.splitlines()


def test_standard_input_is_checked_and_refused_where_it_is_read_twice(lmtrain, tmp_path):
    command = [sys.executable, "-m", "lmtrain", "check", "tiny.yaml", "data.train=-"]
    done = subprocess.run(command, input=b"the cat\n\nthe dog\n", capture_output=True, cwd=tmp_path)
    said = done.stdout.decode()
    assert done.returncode == 0
    assert said.startswith("standard input: text (a file without a known suffix), utf-8, each line is a sequence\n")
    assert "train: 2 sequences" in said
    assert "standard input:3" in said
    done = subprocess.run(command, input=b"the\xff\n", capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.decode().partition(" (")[0]) == (3, "standard input:1:4: not UTF-8")
    code, _, said = lmtrain("train", "tiny.yaml", "data.train=-")
    assert code == 2
    assert "standard input is for check, score and evaluate" in said


def test_odd_files_are_refused_with_the_way_out(lmtrain):
    Path("none").mkdir()
    Path("none/photo.png").write_bytes(b"x")
    for text, said in [
        (written("t.xlsx", b"PK\x03\x04" + bytes(99)), "t.xlsx: a zip archive or an Office file (.xlsx, .ods, .docx)"),
        (written("e.csv", b"\xd0\xcf\x11\xe0" + bytes(99)), "e.csv: an old or an encrypted Office file"),
        (written("t.pdf", b"%PDF-1.7\n"), "t.pdf: a PDF; extract its text first"),
        ("data.train=none", "none: no file below this directory has a known suffix"),
        (written("cut.parquet", b"PAR1" + bytes(50)), "cut.parquet: broken Parquet file: "),
        (written("t.csv", "a,text\n1,b\n2\n"), "t.csv:3: a row of 1 cell, and the first row has 2"),
    ]:
        code, out, error = lmtrain("check", "tiny.yaml", text)
        assert (code, out, error.count("\n")) == (3, "", 1), error
        assert error.startswith(said)
    written("t.txt", "a\nb\n")
    code, _, error = lmtrain("check", "tiny.yaml", "data.train=t.txt", "data.separator=%%")
    assert (code, error) == (3, "t.txt: the separator '%%' never occurs (data.separator)\n")
