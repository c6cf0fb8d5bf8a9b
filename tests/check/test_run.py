"""`lmtrain check RUN`: what a run holds, what of it is damaged, and what a resume would take."""

import pytest

from lmtrain.training.start import train


@pytest.fixture
def run(small, corpus):
    return train(small(), "run", stop_at_step=7).run


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_run(run, shell, corpus):
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    done = shell("check", "run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "run: 2,540 weights, vocabulary 12 (word)"
    assert [line.split(",")[0] for line in lines[1:3]] == ["step-00000007: whole", "step-00000006: whole"]
    assert lines[-2:] == ["lmtrain train --resume continues from step 7", "lmtrain generate takes step 6 (the best)"]
    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, shell, name):
    flip(run / "checkpoints" / "step-00000007" / name)
    done = shell("check", "run")
    assert done.returncode == 4
    assert done.stderr.startswith(f"run/checkpoints/step-00000007/{name}: ")
    assert len(done.stderr.splitlines()) == 1
    assert "lmtrain train --resume continues from step 6" in done.stdout.splitlines()


def test_rows_that_are_gone_or_torn_are_named(run, shell):
    metrics = run / "metrics.jsonl"
    rows = metrics.read_text()
    metrics.write_text(rows + '{"st')  # behind the checkpoint: a resume cuts it off
    assert shell("check", "run").returncode == 0
    metrics.write_text(rows.replace("{", "[", 1))
    assert shell("check", "run").stderr == "run/metrics.jsonl:1: not a row of JSON\n"
    metrics.write_text(rows[:50])
    assert "run/metrics.jsonl: shorter than it was at the newest checkpoint" in shell("check", "run").stderr
    metrics.unlink()
    assert shell("check", "run").stderr == "run/metrics.jsonl: missing\n"


def test_what_a_killed_save_left_is_named_and_is_no_fault(run, shell):
    (run / "checkpoints" / ".step-00000008.new").mkdir()
    done = shell("check", "run")
    assert done.returncode == 0
    left = "left by a save or a removal that was interrupted; a resume removes it"
    assert f".step-00000008.new: {left}" in done.stdout
    [newest, *_] = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    newest.rename(newest.with_name(f".{newest.name}.replaced"))
    said = shell("check", "run").stdout
    assert f".{newest.name}.replaced: whole" in said
    assert f".{newest.name}.replaced: {left}" not in said


def test_a_directory_that_is_no_run(corpus, shell):
    (corpus / "empty").mkdir()
    done = shell("check", "empty")
    assert (done.returncode, done.stderr) == (4, "empty: not a run directory (no config.yaml in it)\n")
    assert shell("check", "empty", "seed=3").returncode == 2


def test_a_run_is_printed_as_lines_only(run, shell):
    done = shell("check", run, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"check {run}: --json is for a config; the parts of a run are printed as lines\n"
