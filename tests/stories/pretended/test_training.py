"""Training on the pretended device gives the CPU's run: weights, optimizer state, figures and samples.

With lmtrain's kernels the two are equal bit for bit, dropout included; with PyTorch's recurrent functions, which are
put together otherwise on the device, they are close.
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
    "n-gram embeddings": (*NGRAMS, "regularization.ngram_embedding_dropout=0.2"),
    "n-gram embeddings, sgd": (*NGRAMS, "optimizer.name=sgd"),
    "n-gram counts": COUNTED,
    "n-gram counts, stream": (*STREAM, *COUNTED, *NGRAMS),
    "sampled output": (*UNTIED, "training.sampled_tokens=2", "training.frequent_tokens=3"),
    "sampled, tied": ("training.sampled_tokens=2", "training.frequent_tokens=0"),
    "adaptive output": (*UNTIED, "model.output=adaptive"),
    "adaptive output, counts": (*UNTIED, *COUNTED, "model.output=adaptive"),
    "muon": ("optimizer.name=muon", "averaging.name=ema", "averaging.decay=0.5"),
    "sparse gradient": (*UNTIED, "optimizer.name=sgd", "optimizer.weight_decay=0"),
    "triggered average": (
        "averaging.name=triggered",
        "averaging.trigger=1",
        "validation.every_steps=1",
        "optimizer.lr=3",
    ),
    "plateau": ("schedule.name=plateau", "validation.every_steps=1", "optimizer.lr=3", "schedule.warmup_steps=0"),
    "bf16": BF16,
    "bf16, gru": (*BF16, "model.cell=gru"),
    "bf16, rnn, stream": (*BF16, *STREAM, "model.cell=rnn"),
    "bf16, counts and n-grams": (*BF16, *COUNTED, *NGRAMS),
    "bf16, adaptive": (*BF16, *UNTIED, "model.output=adaptive"),
}
CLOSE = {
    f"{cell}, {name}": (f"model.cell={cell}", *overrides)
    for cell in ("lstm", "gru", "rnn")
    for name, overrides in {"rows": REGULARISED, "stream": STREAM}.items()
} | {"auto": ("model.backend=auto",)}


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


def rows_of(run):
    """The rows of metrics.jsonl without wall-clock values."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.endswith(WALL_CLOCK)} for row in rows]


@pytest.mark.parametrize("name", EQUAL)
def test_a_run_equals_the_cpus(train, name):
    here, there = train("cpu", "here", *EQUAL[name]), train("auto", "there", *EQUAL[name])
    assert rows_of(there) == rows_of(here)
    assert digest(there) == digest(here)
    assert len(pretend_device.copies) > 20  # it was there


@pytest.mark.parametrize("name", CLOSE)
def test_a_run_with_pytorchs_functions_is_close_to_the_cpus(train, name):
    overrides = ("model.backend=torch", *CLOSE[name])
    here, there = train("cpu", "here", *overrides), train("auto", "there", *overrides)
    weights = [checkpoint.load(run / "checkpoints", 4).model for run in (here, there)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
    for row_here, row_there in zip(rows_of(here), rows_of(there), strict=True):
        samples = [row.pop("samples", None) for row in (row_here, row_there)]
        assert row_there == pytest.approx(row_here, rel=1e-4)
        assert samples[0] == samples[1]


RESUMED = {
    "sentences": (*REGULARISED, "averaging.name=ema"),
    "stream": (*STREAM, *COUNTED, *NGRAMS),
    "muon": (*CARRIED, "optimizer.name=muon"),
    "sparse gradient": EQUAL["sparse gradient"],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(train, name):
    overrides = RESUMED[name]
    whole = train("auto", "whole", *overrides)
    train("auto", "cut", *overrides, stop_at_step=2)
    torch.manual_seed(99)  # as in another process
    assert digest(train("auto", "cut", *overrides, resume=True)) == digest(whole)


def test_a_run_moves_from_the_cpu_to_the_device_and_back(train):
    whole = train("cpu", "whole", *REGULARISED)
    train("cpu", "moved", *REGULARISED, stop_at_step=1)
    train("auto", "moved", *REGULARISED, stop_at_step=3, resume=True)
    assert digest(train("cpu", "moved", *REGULARISED, resume=True)) == digest(whole)


def test_histograms_of_the_weights_are_written(train):
    run = train("auto", "there", "logging.histograms=true", "training.max_steps=1")
    assert any(path.name.startswith("events") and path.stat().st_size > 1000 for path in run.iterdir())
