"""A turn of the training loop, from one step to the next, waits for the device at most once if nothing is logged."""

import itertools
from collections import Counter

import pytest

import lmtrain
from lmtrain.training.step import TrainingStep
from tests import pretend_device
from tests.stories.pretended.test_training import CARRIED, COUNTED, NGRAMS, REGULARISED, STREAM, UNTIED

RUNS = {
    "sentences, both directions": (),
    "packed kernels": ("model.backend=packed",),
    "stream": STREAM,
    "regularised": REGULARISED,
    "accumulated": ("training.accumulate=2",),
    "n-gram counts": COUNTED,
    "n-gram embeddings": NGRAMS,
    "adaptive output": (*UNTIED, "model.output=adaptive"),
    "sampled output": ("training.sampled_tokens=2", "training.frequent_tokens=3"),
    "one direction": ("model.bidirectional=false",),
    "gru": ("model.cell=gru",),
    "carried state": CARRIED,
    "muon, averaged": ("optimizer.name=muon", "averaging.name=ema"),
    "sparse gradient": (*UNTIED, "optimizer.name=sgd", "optimizer.weight_decay=0"),
    "bf16": ("training.precision=bf16", "model.backend=packed"),
}
QUICK = 8  # the number of them that are fast tests


def exchanges_of_turns(small, monkeypatch, *overrides):
    """The waits and the copies of each turn of the loop, as lines with their numbers, but for the first and the last
    turn, which prepare and save."""
    begun, step = [], TrainingStep.__call__

    def noted(self, *arguments, **options):
        begun.append((len(pretend_device.waits), len(pretend_device.copies)))
        return step(self, *arguments, **options)

    monkeypatch.setattr(TrainingStep, "__call__", noted)
    usual = ("training.max_steps=5", "checkpoint.every_steps=null", "logging.every_steps=100", "training.max_epochs=9")
    unseen = (
        "validation.every_steps=100",
        "logging.sample_prompts=[]",
        "training.device=auto",
        "batching.batch_size=4",
    )
    lmtrain.train(small(*usual, *unseen, *overrides), "run")
    turns = list(itertools.pairwise(begun))[1:]
    assert len(turns) == 3
    events = pretend_device.waits, pretend_device.copies
    return [
        [Counter(each.line for each in kind[first:end]) for kind, first, end in zip(events, *turn, strict=True)]
        for turn in turns
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if place >= QUICK else ()) for place, name in enumerate(RUNS)]
)
def test_a_turn_waits_at_most_once(small, monkeypatch, name):
    turns = exchanges_of_turns(small, monkeypatch, *RUNS[name])
    print(f"{name}: waits {[waits.total() for waits, _ in turns]}, copies {[copies.total() for _, copies in turns]}")
    assert max(waits.total() for waits, _ in turns) <= 1, turns[0][0]
