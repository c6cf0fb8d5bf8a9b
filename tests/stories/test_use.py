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


def test_unknown_tokens_are_named(shell):
    assert "prompt 'zzz a': 'zzz' unknown to the model" in shell("generate", "two", "--prompt", "zzz a").stderr
    assert "note: 'zzz', 'yy' unknown to the model" in shell("fill", "two", "zzz yy ____ zzz").stderr
    assert shell("fill", "two", "a ____").stderr == ""
    many = shell("generate", "two", "--prompt", " ".join(f"z{number}" for number in range(9))).stderr
    assert "'z4' and 4 more unknown" in many
