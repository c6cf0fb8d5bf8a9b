"""Training on the pretended device gives the CPU's run: weights, optimizer state, figures and samples.

Where the same kernels run the two are equal bit for bit, dropout included. They are close where a device sums in
another order (the gradient's norm, by which it is clipped; rows of a sparse gradient), where counted n-grams are mixed
in, and where PyTorch's own recurrent functions run, which are put together otherwise on the device.
"""

import json

import pytest
import torch

import lmtrain
from lmtrain.runs import checkpoint
from tests import pretend_device
from tests.oracle import WALL_CLOCK, digest

ONE_DIRECTION = ("model.bidirectional=false",)
STREAM = (*ONE_DIRECTION, "batching.mode=stream", "batching.batch_size=4", "batching.bptt=5")
CARRIED = (*ONE_DIRECTION, "batching.carry_state=true")
UNTIED = ("model.tie_weights=false",)
REGULARISED = (
    "regularization.input_dropout=0.2",
    "regularization.layer_dropout=0.1",
    "regularization.output_dropout=0.2",
    "regularization.embedding_dropout=0.1",
    "regularization.weight_dropout=0.3",
    "regularization.activation_penalty=1",
    "regularization.temporal_penalty=1",
    "regularization.label_smoothing=0.1",
)
NGRAMS = ("model.ngram_embeddings=[2,3]", "model.ngram_embedding_buckets=50")
COUNTED = ("model.ngram_counts=3",)
BF16 = ("training.precision=bf16",)

EQUAL = {
    "lstm": (),
    "gru": ("model.cell=gru",),
    "rnn": ("model.cell=rnn",),
    "layers": ("model.layer_sizes=[8,6,6]", "model.residual=true", "model.layer_norm=true"),
    "stream": STREAM,
    "stream, random chunks": (*STREAM, "batching.random_bptt=true", "averaging.name=ema"),
    "carried state": CARRIED,
    "accumulated": ("training.accumulate=2", "batching.max_tokens=40"),
    "loss weights": ("training.loss_weights.fill=0", "training.loss_weights.backward=0.5"),
    "regularised": REGULARISED,
    "regularised stream": (*STREAM, *REGULARISED),
    "sampled output": (*UNTIED, "training.sampled_tokens=2", "training.frequent_tokens=3"),
    "sampled, tied": ("training.sampled_tokens=2", "training.frequent_tokens=0"),
    "adaptive output": (*UNTIED, "model.output=adaptive"),
    "muon": ("optimizer.name=muon", "averaging.name=ema", "averaging.decay=0.5"),
    "bf16": BF16,
    "bf16, gru": (*BF16, "model.cell=gru"),
    "bf16, rnn, stream": (*BF16, *STREAM, "model.cell=rnn"),
    "bf16, adaptive": (*BF16, *UNTIED, "model.output=adaptive"),
}
CLOSE = {
    "n-gram embeddings": (*NGRAMS, "regularization.ngram_embedding_dropout=0.2"),
    "n-gram embeddings, sgd": (*NGRAMS, "optimizer.name=sgd"),
    "n-gram counts": COUNTED,
    "n-gram counts, stream": (*STREAM, *COUNTED, *NGRAMS),
    "adaptive output, counts": (*UNTIED, *COUNTED, "model.output=adaptive"),
    "sparse gradient": (*UNTIED, "optimizer.name=sgd", "optimizer.weight_decay=0"),
    "triggered average": (
        "averaging.name=triggered",
        "averaging.trigger=1",
        "training.max_steps=6",
        "validation.every_steps=1",
        "optimizer.lr=1",
        "schedule.warmup_steps=0",
    ),
    "plateau": ("schedule.name=plateau", "validation.every_steps=1", "optimizer.lr=0.3", "schedule.warmup_steps=0"),
    "bf16, counts and n-grams": (*BF16, *COUNTED, *NGRAMS),
    "clipped": ("optimizer.clip_grad_norm=0.1",),
    "auto": ("model.backend=auto",),
    "torch.lstm": ("model.backend=torch", *REGULARISED),
    "torch.gru": ("model.backend=torch", "model.cell=gru"),
    "torch.rnn": ("model.backend=torch", "model.cell=rnn"),
    "torch.lstm, stream": ("model.backend=torch", *STREAM),
    "torch.gru, stream": ("model.backend=torch", "model.cell=gru", *STREAM, *REGULARISED),
    "torch.rnn, stream": ("model.backend=torch", "model.cell=rnn", *STREAM),
}
RESUMED = {
    "sentences": (*REGULARISED, "averaging.name=ema"),
    "stream": (*STREAM, *COUNTED, *NGRAMS),
    "muon": (*CARRIED, "optimizer.name=muon"),
    "sparse gradient": CLOSE["sparse gradient"],
}
QUICK = {
    "lstm", "gru", "rnn", "stream", "carried state", "regularised", "n-gram embeddings", "n-gram counts, stream",
    "sampled output", "adaptive output", "muon", "sparse gradient", "bf16", "torch.lstm", "sentences",
}  # fmt: skip


def each_of(table):
    """The names of a table for parametrize: a part of them is fast, and the others are slow tests."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in table]


@pytest.fixture
def train(small):
    """Train a few steps of the small configuration, on one of the two devices."""

    def train(place, name, *overrides, **options):
        usual = (
            "training.max_steps=4",
            "checkpoint.every_steps=null",
            "generation.max_tokens=5",
            "model.backend=packed",
        )
        return lmtrain.train(small(*usual, *overrides, f"training.device={place}"), name, **options).run

    return train


def assert_equal_figures(there, here, rel):
    """Compare the rows of metrics.jsonl without wall-clock values, and with the gradient's norm to the sixth digit."""
    rows = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (here, there)]
    for row_here, row_there in zip(*rows, strict=True):
        assert row_there.keys() == row_here.keys()
        for tag, value in row_here.items():
            if isinstance(value, float) and not tag.endswith(WALL_CLOCK):
                tolerance = max(rel, 1e-6 * (tag == "train/grad_norm"))
                assert row_there[tag] == pytest.approx(value, rel=tolerance, abs=0), tag
            elif not isinstance(value, float):
                assert row_there[tag] == value, tag


def saved_by(run):
    """The tensors of the last checkpoint by name."""
    saved = checkpoint.load(run / "checkpoints", json.loads((run / "last.json").read_text())["step"])
    return saved.model | saved.training


@pytest.mark.parametrize("name", each_of(EQUAL))
def test_a_run_equals_the_cpus(train, name):
    overrides = ("optimizer.clip_grad_norm=null", *EQUAL[name])
    here, there = train("cpu", "here", *overrides), train("auto", "there", *overrides)
    assert_equal_figures(there, here, rel=0)
    of_here, of_there = saved_by(here), saved_by(there)
    torch.testing.assert_close({key: of_there[key] for key in of_here}, of_here, rtol=0, atol=0)
    assert pretend_device.copies  # it was there


@pytest.mark.parametrize("name", each_of(CLOSE))
def test_a_run_is_close_to_the_cpus(train, name):
    overrides = CLOSE[name]
    here, there = train("cpu", "here", *overrides), train("auto", "there", *overrides)
    assert_equal_figures(there, here, rel=1e-4)
    of_here, of_there = saved_by(here), saved_by(there)
    torch.testing.assert_close({key: of_there[key] for key in of_here}, of_here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", each_of(RESUMED))
def test_a_resumed_run_equals_the_uninterrupted_one(train, name):
    overrides = (*RESUMED[name], "optimizer.clip_grad_norm=0.5")
    whole = train("auto", "whole", *overrides)
    train("auto", "cut", *overrides, stop_at_step=2)
    torch.manual_seed(99)  # as in another process
    assert digest(train("auto", "cut", *overrides, resume=True)) == digest(whole)


def test_a_run_moves_from_the_cpu_to_the_device_and_back(train):
    overrides = (*REGULARISED, "optimizer.clip_grad_norm=null")
    whole = train("cpu", "whole", *overrides)
    train("cpu", "moved", *overrides, stop_at_step=1)
    train("auto", "moved", *overrides, stop_at_step=3, resume=True)
    moved = train("cpu", "moved", *overrides, resume=True)
    torch.testing.assert_close(saved_by(moved), saved_by(whole), rtol=0, atol=0)


def test_a_resumed_run_draws_the_devices_own_random_numbers(train):
    pretend_device.generator.own(0)
    whole = train("auto", "whole", *REGULARISED)
    assert digest(train("auto", "again", *REGULARISED)) == digest(whole)  # the seed is the device's, too
    train("auto", "cut", *REGULARISED, stop_at_step=2)
    pretend_device.generator.own(99)
    assert digest(train("auto", "cut", *REGULARISED, resume=True)) == digest(whole)


@pytest.mark.slow
def test_histograms_of_the_weights_are_written(train):
    run = train("auto", "there", "logging.histograms=true", "training.max_steps=1")
    assert any(path.name.startswith("events") and path.stat().st_size > 1000 for path in run.iterdir())
