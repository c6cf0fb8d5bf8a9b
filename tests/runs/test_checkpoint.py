"""Checkpoints: what is damaged is never loaded, what was saved is never lost."""

import sys
from pathlib import Path

import pytest
import torch

import lmtrain
from lmtrain.data.preparation import prepare
from lmtrain.errors import ArtefactError
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.weights import build_model, named_weights
from lmtrain.system.processes import SingleProcess
from lmtrain.training.checkpointer import Checkpointer
from lmtrain.training.start import train
from lmtrain.training.step import TrainingStep
from tests.notes import Notes
from tests.oracle import digest


def test_the_first_whole_checkpoint_is_loaded_and_damaged_ones_are_named():
    def read(step):
        if step > 5:
            raise ArtefactError(f"{step}: damaged")
        return step

    notes = []
    assert checkpoint.load_first_whole([7, 6, 5, 4], read, notes.append) == 5
    assert notes == ["skipped: 7: damaged", "skipped: 6: damaged"]
    assert checkpoint.load_first_whole([], read) is None
    with pytest.raises(ArtefactError) as error:
        checkpoint.load_first_whole([7, 6], read)
    assert error.value.faults[0] == "7: damaged"
    assert error.value.faults[1].startswith("6: damaged; no checkpoint can be used")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["training"].update(step=77),
        lambda state: state["training"].update(epoch=-1),
        lambda state: state["training"].update(next_batch="x"),
        lambda state: state["training"].update(window={"tallies": 3}),
        lambda state: state["training"].update(precision="fp7"),
        lambda state: state["lengths"].update({"metrics.jsonl": -1}),
        lambda state: state.pop("data"),
    ],
)
def test_a_broken_state_is_refused_before_anything_is_written(small, tmp_path, change):
    run = tmp_path / "run"
    train(small(), run, stop_at_step=3)
    saved = checkpoint.load(run / "checkpoints", 3)
    change(saved.state)
    checkpoint.save(run / "checkpoints", saved)
    rows = (run / "metrics.jsonl").read_text()
    with pytest.raises(ArtefactError, match=r"state\.json: not a training state; no checkpoint can be used"):
        train(small(), run, resume=True)
    assert (run / "metrics.jsonl").read_text() == rows


def test_a_run_without_a_whole_checkpoint_is_not_started_over(small, tmp_path):
    run = tmp_path / "run"
    train(small(), run, stop_at_step=2)
    weights_file = checkpoint.directory_of(run / "checkpoints", 2) / "model.safetensors"
    weights_file.write_bytes(b"")
    rows = (run / "metrics.jsonl").read_text()
    with pytest.raises(ArtefactError, match="damaged: not the bytes that were saved; no checkpoint can be used"):
        train(small(), run, resume=True)
    assert (run / "metrics.jsonl").read_text() == rows


def test_a_newer_format_is_not_skipped_as_damaged(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(small(), run, stop_at_step=5)
    saved = checkpoint.load(run / "checkpoints", 5)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "CHECKPOINT_FORMAT", 2)
        checkpoint.save(run / "checkpoints", saved)
    with pytest.raises(ArtefactError, match="format 2 is newer"):
        train(small(), run, resume=True)


def test_a_checkpoint_that_is_being_replaced_comes_back(small, tmp_path):
    """The process was killed after it renamed the old checkpoint, and before it renamed the new one."""
    run = tmp_path / "run"
    wanted = digest(train(small(), tmp_path / "whole").run)
    train(small(), run, stop_at_step=6)
    home = checkpoint.directory_of(run / "checkpoints", 6)
    home.rename(home.with_name(f".{home.name}{checkpoint.REPLACED}"))
    assert checkpoint.steps(run / "checkpoints")[0] == 6
    assert lmtrain.load(run).step == 6  # reading alone puts nothing back
    assert not home.exists()
    progress = Notes()
    assert digest(train(small(), run, resume=True, progress=progress).run) == wanted
    assert "resumed from step 6" in progress.notes


def test_a_foreign_directory_among_the_checkpoints_is_left_alone(small, tmp_path):
    train(small(), tmp_path / "run", stop_at_step=2)
    foreign = tmp_path / "run" / "checkpoints" / "step-1"
    foreign.mkdir()
    assert train(small(), tmp_path / "run", resume=True).step == 12
    assert foreign.exists()


def test_tied_weights_are_saved_once(small, tmp_path):
    run = train(small("training.max_steps=2"), tmp_path / "run").run
    saved = checkpoint.load(run / "checkpoints", 2).model
    assert "output.weight" not in saved
    model = lmtrain.load(run).model
    assert model.output.weight is model.embedding.weight
    assert all(torch.equal(saved[name], tensor) for name, tensor in named_weights(model).items())


def test_each_manifest_is_read_twice_for_a_resume_and_for_a_load(small, tmp_path):
    """Once before PyTorch is imported, and once with the tensors."""
    run = train(small("training.max_steps=3", "data.valid=null"), tmp_path / "run").run
    read = []

    def note(event, given):
        if event == "open" and str(given[0]).startswith(str(run)):  # a hook stays for good, but the run does not
            read.append(Path(given[0]).name)

    sys.addaudithook(note)
    lmtrain.load(run)
    assert read.count("manifest.json") == 2
    read.clear()
    train(small("training.max_steps=3", "data.valid=null"), run, resume=True)
    assert read.count("manifest.json") == 2


def test_a_checkpoint_is_checked_before_the_weights_are_rolled_back_to_it(small, tmp_path):
    notes = Notes()
    run, corpora = RunDirectory(tmp_path / "run"), prepare(small(), notes.note)
    train(small(), run.path, stop_at_step=3)
    step = TrainingStep(small(), build_model(small(), corpora.tokenizer.vocab_size))
    checkpointer = Checkpointer(run, step, corpora, small(), SingleProcess())
    assert checkpointer.restore(notes.note) is not None
    wanted = [weight.clone() for weight in step.model.parameters()]
    moments = [state["exp_avg"].clone() for state in step.optimizers[0].state.values()]
    with torch.no_grad():
        for weight in step.model.parameters():
            weight.add_(1)
    path = checkpoint.directory_of(run.checkpoints, 3) / "training.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    checkpointer.roll_back(3, notes.note)
    assert notes.notes[-1].startswith("warning: continuing with the weights as they are: ")
    assert all(map(torch.equal, step.model.parameters(), [weight + 1 for weight in wanted]))
    path.write_bytes(good)
    checkpointer.roll_back(3, notes.note)
    assert all(map(torch.equal, step.model.parameters(), wanted))
    assert all(map(torch.equal, [state["exp_avg"] for state in step.optimizers[0].state.values()], moments))
