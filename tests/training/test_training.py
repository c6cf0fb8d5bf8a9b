"""A resumed run equals the uninterrupted one, bit for bit; and what ends, stops and refuses a run."""

import gc
import json
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from lmtrain.errors import ArtefactError, ConfigError, DataError, DivergedError, OutOfMemoryError
from lmtrain.runs import checkpoint
from lmtrain.runs.weights import build_model
from lmtrain.system import device
from lmtrain.training.start import train
from lmtrain.training.step import TrainingStep
from lmtrain.training.tracking import Tracker
from tests.oracle import digest

SETTINGS = {
    "two directions": [],
    "one direction": ["model.bidirectional=false"],
    "gru, accumulating": ["model.cell=gru", "training.accumulate=4", "training.max_epochs=3"],
    "rnn, by tokens, validating in mid-epoch": [
        "model.cell=rnn",
        "batching.max_tokens=70",
        "validation.every_steps=4",
        "optimizer.name=sgd",
    ],
    "stream, random chunks, averaged, all dropouts": [
        "batching.mode=stream", "batching.bptt=11", "batching.random_bptt=true", "model.bidirectional=false",
        "averaging.name=ema", "regularization.input_dropout=0.2", "regularization.weight_dropout=0.3",
        "regularization.embedding_dropout=0.1", "regularization.temporal_penalty=0.5", "training.accumulate=2",
        "schedule.name=one_cycle", "training.max_epochs=4",
    ],
    "carried lines, cut and rolled back": [
        "batching.carry_state=true", "batching.batch_size=5", "model.bidirectional=false", "schedule.name=plateau",
        "optimizer.lr=0.3", "validation.every_steps=3", "model.recent_tokens=20",
    ],
    "triggered averaging": [
        "model.bidirectional=false", "averaging.name=triggered", "averaging.trigger=1", "optimizer.lr=0.3",
        "validation.every_steps=2",
    ],
    "counted n-grams": ["model.ngram_counts=4", "averaging.name=ema"],
    "n-grams, muon, averaged": [
        "batching.mode=stream", "batching.batch_size=8", "batching.bptt=9", "model.bidirectional=false",
        "model.ngram_embeddings=[2, 3]", "model.ngram_counts=5", "model.recent_tokens=90", "optimizer.name=muon",
        "averaging.name=ema",
    ],
    "adaptive, no validation": ["model.output=adaptive", "model.tie_weights=false", "data.valid=null"],
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resumed_run_equals_the_uninterrupted_one_from_every_step(small, tmp_path, settings):
    config = small(*settings)
    whole = train(config, tmp_path / "whole")
    wanted = digest(whole.run)
    assert whole.step >= 6
    for step in range(1, whole.step + 1):
        cut = tmp_path / f"cut-{step}"
        assert train(config, cut, stop_at_step=step).step == step
        assert digest(cut) != wanted or step == whole.step
        assert train(config, cut, resume=True).step == whole.step
        assert digest(cut) == wanted, step


def test_optimizer_state_of_any_shape_is_restored(small, tmp_path, monkeypatch):
    """Adafactor keeps a row and a column for each matrix instead of a moment for each weight."""

    def factored(model, **settings):
        return [torch.optim.Adafactor(model.parameters(), lr=settings["lr"])]

    monkeypatch.setattr("lmtrain.training.step.build_optimizers", factored)
    wanted = digest(train(small("training.max_steps=9"), tmp_path / "whole").run)
    train(small("training.max_steps=9"), tmp_path / "cut", stop_at_step=4)
    kept = checkpoint.load(tmp_path / "cut" / "checkpoints", 4).training
    shapes = {tuple(kept[f"optimizer/{part}/embedding.weight"].shape) for part in ("row_var", "col_var")}
    assert shapes == {(12, 1), (1, 6)}
    train(small("training.max_steps=9"), tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == wanted


def test_optimizer_state_that_would_be_read_beyond_its_end_is_refused(small, tmp_path):
    run = tmp_path / "run"
    train(small(), run, stop_at_step=3)
    saved = checkpoint.load(run / "checkpoints", 3)
    saved.training["optimizer/exp_avg/embedding.weight"] = torch.zeros(1)
    checkpoint.save(run / "checkpoints", saved)
    with pytest.raises(ArtefactError, match=r"training\.safetensors: not of this run"):
        train(small(), run, resume=True)


def test_a_run_stopped_after_each_step_ends_the_same(small, tmp_path):
    config = small("training.max_steps=7")
    wanted = digest(train(config, tmp_path / "whole").run)
    for step in range(1, 8):
        train(config, tmp_path / "cut", stop_at_step=step, resume=step > 1)
    train(config, tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == wanted


def test_accumulated_batches_give_the_gradient_of_one_large_batch(small, tmp_path):
    """Nats are summed over all batches and divided once: unequal batches weigh by their tokens."""
    settings = ["model.dropout=0", "training.max_steps=1", "optimizer.name=sgd", "batching.bucket_batches=100"]
    large = train(small(*settings, "batching.batch_size=43"), tmp_path / "large").run
    parts = train(small(*settings, "batching.batch_size=5", "training.accumulate=9"), tmp_path / "parts").run
    one, other = (checkpoint.load(run / "checkpoints", 1).model for run in (large, parts))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_early_stopping_and_the_best_checkpoint(small, tmp_path):
    config = small("training.max_epochs=60", "training.patience=3", "optimizer.lr=0.05", "checkpoint.every_steps=null")
    result = train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
    best = min(losses, key=losses.get)
    assert result.best_step == best
    assert list(losses).index(best) == len(losses) - 4  # three worse ones, then the end
    assert json.loads((result.run / "best.json").read_text()) == {"step": best, "valid_loss": losses[best]}
    assert json.loads((result.run / "last.json").read_text())["step"] == result.step
    kept = checkpoint.steps(result.run / "checkpoints")
    assert {best, result.step} <= set(kept)
    assert len(kept) <= 3


def test_a_resume_takes_more_epochs_and_refuses_other_changes_by_key(small, tmp_path):
    train(small("training.max_epochs=1"), tmp_path / "run")
    assert train(small("training.max_epochs=2"), tmp_path / "run", resume=True).step == 12
    with pytest.raises(ConfigError) as error:
        train(small("model.hidden_size=9", "seed=4"), tmp_path / "run", resume=True)
    assert [fault.split(":")[0] for fault in error.value.faults] == ["seed", "model.hidden_size"]


def test_changed_training_text_is_refused_by_name(small, corpus, tmp_path):
    train(small(), tmp_path / "run", stop_at_step=2)
    with open(corpus / "train.txt", "a") as handle:
        handle.write("a b c\n")
    with pytest.raises(DataError, match=r"train\.txt: changed since the run was begun"):
        train(small(), tmp_path / "run", resume=True)


def test_an_added_file_is_refused_too(small, corpus, tmp_path):
    train(small("data.train=trai*.txt"), tmp_path / "run", stop_at_step=2)
    (corpus / "train2.txt").write_text("a b\n")
    with pytest.raises(DataError, match=r"train2\.txt: changed"):
        train(small("data.train=trai*.txt", "data.cache_dir=other"), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_before_the_update(small, tmp_path):
    config = small("optimizer.name=sgd", "optimizer.lr=1e30", "optimizer.clip_grad_norm=null", "training.max_epochs=9")
    with pytest.raises(DivergedError, match=r"step \d+: .*learning rate \d.*lower optimizer\.lr"):
        train(config, tmp_path / "run")
    for step in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        saved = checkpoint.load(tmp_path / "run" / "checkpoints", step)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.model.values())


def test_a_signal_that_was_ignored_stays_ignored(corpus):
    command = f"trap '' HUP; exec {sys.executable} -m lmtrain train config.yaml training.max_epochs=9 --run-dir cut"
    process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not checkpoint.steps(corpus / "cut" / "checkpoints"):
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0


def test_weights_that_are_not_finite_are_never_saved(small, tmp_path):
    settings = ["optimizer.lr=1e40", "schedule.warmup_steps=0", "validation.every_steps=1"]
    with pytest.raises(DivergedError):
        train(small(*settings), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_metric_rows_of_steps_that_come_again_are_cut_off(small, tmp_path):
    wanted = digest(train(small(), tmp_path / "whole").run)
    train(small(), tmp_path / "run", stop_at_step=5)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 6, "epoch": 0.5}\n{"step": 7, "epo')
    assert digest(train(small(), tmp_path / "run", resume=True).run) == wanted


def test_a_time_budget_ends_the_run_and_the_schedule(small, tmp_path):
    config = small("training.max_epochs=100000", "training.max_minutes=0.05", "schedule.final_fraction=0")
    started_s = time.monotonic()
    result = train(config, tmp_path / "run")
    assert time.monotonic() - started_s < 20
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates[-1] < 0.2 * max(rates)


def test_a_time_budget_begins_with_the_first_step(small, tmp_path, monkeypatch):
    """Preparing, hashing and counting n-grams are not paid from it, neither at first nor in a resume."""

    def slow(*arguments):
        time.sleep(1)
        return build_model(*arguments)

    monkeypatch.setattr("lmtrain.training.trainer.build_model", slow)
    config = small("training.max_epochs=100000", "training.max_minutes=0.016")
    train(config, tmp_path / "run", stop_at_step=2)
    first = checkpoint.load(tmp_path / "run" / "checkpoints", 2).state["training"]["elapsed_s"]
    assert 0 < first < 0.9
    result = train(config, tmp_path / "run", resume=True)
    assert result.step > 2
    whole = checkpoint.load(tmp_path / "run" / "checkpoints", result.step).state["training"]["elapsed_s"]
    assert 0.96 <= whole < 1.9


def test_no_budget_is_too_short_for_a_step(small, tmp_path):
    result = train(small("training.max_minutes=1e-9"), tmp_path / "run")
    assert (result.step, result.best_step) == (1, 1)
    assert train(small("training.max_minutes=1e-9"), tmp_path / "run", resume=True).step == 1


def test_a_start_that_fails_closes_what_it_has_opened(small, tmp_path, monkeypatch):
    trackers, build = [], Tracker.__init__

    def noted(self, *arguments):
        build(self, *arguments)
        trackers.append(self)

    def out_of_memory(self, batch):
        raise MemoryError

    monkeypatch.setattr(Tracker, "__init__", noted)
    monkeypatch.setattr(TrainingStep, "warm_up", out_of_memory)
    with pytest.raises(OutOfMemoryError):
        train(small(), tmp_path / "run")
    assert [(each.metrics.closed, each.board.handle.closed) for each in trackers] == [(True, True)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmtrain-batches")]


def test_precision_is_chosen_by_the_size_of_the_largest_layer(small, monkeypatch):
    monkeypatch.setattr(device, "has_onednn", lambda dtype: True)
    run = train(small("model.layer_sizes=[5, 24, 8]", "training.precision=auto", "training.max_steps=1")).run
    because = json.loads((run / "environment.json").read_text())["precision_because"]
    assert because.startswith("a product of 512 x 24 x 96 ")


def test_equal_seeds_give_equal_runs_and_others_do_not(small, tmp_path):
    runs = [train(small(f"seed={seed}"), tmp_path / str(n)).run for n, seed in enumerate([3, 3, 4])]
    assert digest(runs[0]) == digest(runs[1]) != digest(runs[2])


@pytest.mark.parametrize(
    "ngrams", [[], ["model.ngram_counts=3", "model.recent_tokens=9", "model.ngram_embeddings=[2]"]]
)
def test_the_start_does_not_wait_for_pytorchs_compiler(small, ngrams):
    """Nor for the library that computes with symbols for it."""
    code = "import sys, lmtrain; from lmtrain.config import load_config\n"
    code += "lmtrain.load(lmtrain.train(load_config('config.yaml', sys.argv[1:])).run).generate(['a'])\n"
    code += "sys.exit(', '.join({'torch._dynamo', 'sympy'} & sys.modules.keys()) or None)"
    subprocess.run([sys.executable, "-c", code, *ngrams], check=True)


def test_a_finished_training_frees_its_model(small, tmp_path, monkeypatch):
    """At once, without Python's collector of reference cycles: a program may train again, or load the run."""
    steps, build = [], TrainingStep.__init__

    def noted(self, *arguments):
        build(self, *arguments)
        steps.append(weakref.ref(self.model))

    monkeypatch.setattr(TrainingStep, "__init__", noted)
    gc.disable()
    try:
        train(small("training.max_steps=2"), tmp_path / "run")
        assert [step() for step in steps] == [None]
    finally:
        gc.enable()
