"""A signal ends a run between two steps, or in the middle of a validation, which the resumed run then repeats."""

import itertools
import json
import os
import signal
import threading
import time

import pytest

from lmtrain.data.batches import loader
from lmtrain.errors import StoppedError
from lmtrain.runs import checkpoint
from lmtrain.training import validation
from lmtrain.training.start import train
from tests.oracle import digest

SETTINGS = {
    "best is saved": ["validation.every_steps=2"],
    "plateau": ["validation.every_steps=3", "schedule.name=plateau", "optimizer.lr=0.3"],
    "averaged stream": [
        "batching.mode=stream", "batching.bptt=11", "model.bidirectional=false", "averaging.name=triggered",
        "averaging.trigger=1", "optimizer.lr=0.3", "validation.every_steps=2", "training.max_steps=9",
    ],
    "only at the end": ["validation.every_steps=1000", "model.ngram_counts=3"],
}  # fmt: skip


def steps_validated(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "valid/loss" in row]


@pytest.mark.parametrize(("name", "place"), [*((name, "batches") for name in SETTINGS), ("best is saved", "samples")])
def test_a_validation_that_a_signal_breaks_off_is_repeated_by_the_resumed_run(
    small, tmp_path, monkeypatch, name, place
):
    monkeypatch.setattr(loader, "EVALUATION_TOKENS", 20)  # several batches
    config = small(*SETTINGS[name])
    wanted = digest(train(config, tmp_path / "whole").run)
    validated = steps_validated(tmp_path / "whole")
    evaluation_batches, generate = validation.evaluation_batches, validation.generate
    begun = itertools.count()

    def interrupt():
        if next(begun) % 2 == 0:  # the repeated one is left alone
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted_batches(*arguments, **settings):
        batches, carried = evaluation_batches(*arguments, **settings)
        first, *rest = batches
        assert len(rest) > 1

        def each():
            yield first
            interrupt()
            yield from rest

        return each(), carried

    def interrupted_generate(*arguments, **settings):
        interrupt()
        return generate(*arguments, **settings)

    if place == "batches":
        monkeypatch.setattr(validation, "evaluation_batches", interrupted_batches)
    else:
        monkeypatch.setattr(validation, "generate", interrupted_generate)
    for step in validated:
        with pytest.raises(StoppedError, match=f"stopped at step {step} by SIGINT; the state is saved"):
            train(config, tmp_path / "cut", resume=True)
        assert checkpoint.steps(tmp_path / "cut" / "checkpoints")[0] == step
        assert step not in steps_validated(tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == wanted


ENDLESS = {
    "validation": ["validation.every_steps=2", "logging.sample_prompts=[]"],
    "samples": ["validation.every_steps=2", "generation.max_tokens=1000000"],
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_signal_ends_a_long_validation_at_once(small, tmp_path, monkeypatch, what):
    if what == "validation":
        evaluation_batches = validation.evaluation_batches

        def endless(*arguments, **settings):
            batches, carried = evaluation_batches(*arguments, **settings)
            return itertools.cycle(list(batches)), carried

        monkeypatch.setattr(validation, "evaluation_batches", endless)
    began = threading.Event()
    evaluate, generate = validation.evaluate, validation.generate
    monkeypatch.setattr(validation, "evaluate", lambda *given: began.set() or evaluate(*given))
    monkeypatch.setattr(validation, "generate", lambda *given, **more: began.set() or generate(*given, **more))
    signalled_s = []

    def interrupt():
        began.wait()
        time.sleep(0.3)
        signalled_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stream = ["batching.mode=stream", "batching.bptt=11", "model.bidirectional=false"]  # without an end token
    with pytest.raises(StoppedError, match="stopped at step 2 by SIGTERM; the state is saved"):
        train(small(*stream, *ENDLESS[what]), tmp_path / "run")
    assert time.monotonic() - signalled_s[0] < 5  # mostly a fraction of a second; the machine may be busy
    thread.join()


def test_a_system_without_hangups_trains(small, tmp_path, monkeypatch):
    """Windows has no SIGHUP."""
    monkeypatch.delattr(signal, "SIGHUP")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(small("training.max_steps=2"), tmp_path / "run").step == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
