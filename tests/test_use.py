"""generate, score and fill at the command line: what they print, and what they refuse."""

import json
import math
import subprocess
import sys

import pytest

from lmtrain.training.start import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of two directions and one of one, trained for a few steps."""
    from lmtrain.config import load_config
    from tests.conftest import SMALL, sentences

    folder = tmp_path_factory.mktemp("use")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "train.txt").write_text(sentences(43, seed=1))
        (folder / "valid.txt").write_text(sentences(9, seed=2))
        (folder / "config.yaml").write_text(SMALL)
        train(load_config("config.yaml", ["training.max_steps=3", "model.bidirectional=false"]), "one")
        train(load_config("config.yaml", ["training.max_steps=3"]), "two")
    return folder


@pytest.fixture(autouse=True)
def there(runs, monkeypatch):
    monkeypatch.chdir(runs)


def rows(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_texts_are_drawn_counted_and_the_same_for_a_seed(shell):
    arguments = ["generate", "two", "--prompt", "a", "--prompt", "b", "--temperature", 1.2, "--count", 3, "--json"]
    first = rows(shell(*arguments, "--seed", 4))
    assert [row["prompt"] for row in first] == ["a"] * 3 + ["b"] * 3
    assert rows(shell(*arguments, "--seed", 4)) == first
    assert rows(shell(*arguments, "--seed", 5)) != first
    assert rows(shell("generate", "two", "--top-k", 1, "--json")) == rows(shell("generate", "two", "--json"))


def test_beams_probabilities_and_what_comes_before(shell):
    found = rows(shell("generate", "two", "--prompt", "a", "--beams", 4, "--count", 4, "--json"))
    values = [row["log_probability"] for row in found]
    assert values == sorted(values, reverse=True)
    (row,) = rows(shell("generate", "two", "--prompt", "a", "--show-probabilities", "--json"))
    total = sum(math.log(each["probability"]) for each in row["tokens"])
    assert total == pytest.approx(row["log_probability"], rel=1e-4)
    plain = shell("generate", "two", "--prompt", "a", "--show-probabilities").stdout.splitlines()
    assert plain[0] == row["text"]
    assert [line.split()[1] for line in plain[1:]] == [each["text"] for each in row["tokens"]]
    (row,) = rows(shell("generate", "two", "--prompt", "a b", "--backward", "--json"))
    assert row["text"] == row["completion"] + "a b"


def test_a_stream_prints_the_text(shell):
    for more in ([], ["--temperature", 1, "--seed", 3], ["--stop", "c"]):
        whole = shell("generate", "two", "--prompt", "a", *more).stdout
        assert shell("generate", "two", "--prompt", "a", "--stream", *more).stdout == whole


def test_standard_input_is_scored_as_a_file_is(runs, shell):
    wanted = shell("score", "one", "valid.txt").stdout
    for arguments in (["score", "one"], ["score", "one", "-"]):
        done = subprocess.run(
            [sys.executable, "-m", "lmtrain", *arguments],
            cwd=runs,
            input=(runs / "valid.txt").read_text(),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, wanted)
    both = [float(line) for line in shell("score", "two", "valid.txt", "--direction", "both").stdout.split()]
    sides = [
        [float(line) for line in shell("score", "two", "valid.txt", "--direction", side).stdout.split()]
        for side in ("forward", "backward")
    ]
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(*sides, strict=True)], abs=2e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "two", "--temperature", "-1"], 2, "'--temperature': Input should be greater than or equal to 0"),
        (["generate", "two", "--temperature", "nan"], 2, "'--temperature': Input should be greater than or equal to 0"),
        (["generate", "two", "--top-p", "0"], 2, "top_p: should be greater than 0"),
        (["generate", "two", "--repetition-penalty", "0"], 2, "repetition_penalty: should be greater than 0"),
        (["generate", "two", "--temperature", "0", "--top-k", "3"], 2, "draws nothing at random: leave out --top-k"),
        (["generate", "two", "--count", "2"], 2, "--count: the most probable text is one; add --temperature"),
        (["generate", "two", "--count", "2", "--repetition-penalty", "2"], 2, "--count: the most probable text is one"),
        (["generate", "two", "--count", "3", "--beams", "2"], 2, "--beams 2 finds no more than 2"),
        (["generate", "two", "--beams", "2", "--temperature", "1"], 2, "--beams searches for the most probable text"),
        (["generate", "two", "--beams", "2", "--stop", "x"], 2, "--beams searches for the most probable text"),
        (["generate", "two", "--length-penalty", "1"], 2, "add --beams"),
        (["generate", "two", "--stop", ""], 2, "--stop: an empty text"),
        (["generate", "two", "--stream", "--json"], 2, "--stream prints one text as it comes"),
        (["generate", "two", "--stream", "--prompt", "a", "--prompt", "b"], 2, "--stream prints one text"),
        (["generate", "one", "--backward"], 2, "this run reads in one direction"),
        (["score", "one", "valid.txt", "--direction", "both"], 2, "this run reads in one direction"),
        (["score", "two", "valid.txt", "--direction", "both", "--tokens"], 2, "is one direction's"),
        (["score", "two", "valid.txt", "--base", "3"], 2, "--base"),
        (["score", "two", "nowhere.txt"], 3, "nowhere.txt: no such file"),
        (["score", "two", "bytes.bin"], 3, "bytes.bin:2:1: byte 5 is not UTF-8"),
        (["score", "nowhere", "valid.txt"], 4, "nowhere"),
        (["fill", "two", "a b"], 2, "holds no blank; mark one with ____"),
        (["fill", "two", "____ a ____"], 2, "holds 2 blanks"),
        (["fill", "one", "a ____"], 2, "to fill a blank takes two"),
        (["fill"], 2, "fill: name a text with one blank"),
        (["fill", "two", "a ____", "--tokens", "0"], 2, "--tokens"),
        (["embed", "two", "valid.txt"], 2, "embed: name the file to write"),
        (["embed", "two", "valid.txt", "-o", "out.txt"], 2, "an .npz file is written"),
        (["embed", "two", "valid.txt", "-o", "bytes.npz"], 2, "bytes.npz: is there already"),
        (["export", "two"], 2, "export: name the folder to write"),
        (["export", "two", "-o", "two"], 2, "two: is there already"),
        (["export", "two", "-o", "new", "--format", "safetensors", "--int8"], 2, "--int8 is for --format onnx"),
        (["export", "two", "-o", "new", "--format", "gguf"], 2, "--format"),
        (["evaluate", "two", "--worst", "0"], 2, "--worst"),
        (["embed", "two", "bytes.bin", "-o", "new.npz"], 3, "bytes.bin:2:1: byte 5 is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line(runs, shell, arguments, code, said):
    for name in ("bytes.bin", "bytes.npz"):
        (runs / name).write_bytes(b"fine\n\xff\n")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    done = shell(*arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_unknown_tokens_are_named(shell):
    assert "prompt 'zzz a': 'zzz' unknown to the model" in shell("generate", "two", "--prompt", "zzz a").stderr
    assert "note: 'zzz', 'yy' unknown to the model" in shell("fill", "two", "zzz yy ____ zzz").stderr
    assert shell("fill", "two", "a ____").stderr == ""
    many = shell("generate", "two", "--prompt", " ".join(f"z{number}" for number in range(9))).stderr
    assert "'z4' and 4 more unknown" in many
