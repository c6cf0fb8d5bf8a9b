"""What a run reports: metrics.jsonl, and the same through TensorBoard's own reader and its real server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lmtrain.errors import DivergedError
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from lmtrain.training.tracking import Tracker

TRAIN = {
    f"train/{name}"
    for name in [
        "loss",
        "perplexity",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "data_wait_fraction",
        "padding_fraction",
    ]
}
VALID = {f"valid/{name}" for name in ["loss", "perplexity", "backward_perplexity", "fill_accuracy"]}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def board_of(run):
    board = EventAccumulator(str(run))
    board.Reload()
    return board


def test_tags_read_back_equal_the_metric_rows(small):
    run = train(small()).run
    board, rows = board_of(run), rows_of(run)
    assert set(board.Tags()["scalars"]) >= TRAIN | VALID
    for tag in TRAIN | VALID:
        read = [(event.step, event.value) for event in board.Scalars(tag)]
        assert read == [(row["step"], pytest.approx(row[tag], rel=1e-6)) for row in rows if tag in row]
        assert len(read) >= 2
    samples = [(row["step"], row["samples"]) for row in rows if "samples" in row]
    written = [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in board.Tensors("samples/text_summary")
    ]
    assert written == [
        (step, "\n\n".join(f"    {each['text'] or ' '}" for each in several)) for step, several in samples
    ]
    assert len(written) == 2
    start = HParamsPluginData.FromString(
        board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert start.hparams["model.hidden_size"].number_value == 8
    assert start.hparams["model.cell"].string_value == "lstm"
    assert all({"step", "epoch"} <= set(row) for row in rows)


def test_no_step_twice_after_a_resume(small, tmp_path):
    run = tmp_path / "run"
    train(small(), run, stop_at_step=7)
    extra = Tracker(run, {path.name: path.stat().st_size for path in run.glob("*.*")}, print)  # then killed further on
    for step in (8, 9, 10):
        extra.log(step, 1.0, {"train/loss": 99.0})
    extra.close()
    train(small(), run, resume=True)
    board = board_of(run)
    for tag in board.Tags()["scalars"]:
        steps = [event.step for event in board.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
        assert all(event.value != 99.0 for event in board.Scalars(tag))
    steps = [row["step"] for row in rows_of(run) if "train/loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_histograms_on_request(small):
    assert board_of(train(small("training.max_steps=2")).run).Tags()["histograms"] == []
    run = train(small("training.max_steps=2", "logging.histograms=true")).run
    board = board_of(run)
    (event,) = board.Histograms("embedding.weight")
    weights = load(run).model.embedding.weight
    assert (event.step, event.histogram_value.num) == (2, weights.numel())
    assert event.histogram_value.sum == pytest.approx(float(weights.detach().double().sum()), abs=1e-4)


def test_full_precision_in_the_rows(small):
    losses = [row["train/loss"] for row in rows_of(train(small()).run) if "train/loss" in row]
    assert any(len(repr(loss)) > 12 for loss in losses)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_real_tensorboard_serves_the_run(small):
    run = train(small()).run
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent), "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": ""},  # TensorBoard's server imports what it calls deprecated itself
    )
    try:
        address = f"http://127.0.0.1:{port}/data/plugin/scalars"
        for _ in range(120):
            try:
                tags = json.load(urllib.request.urlopen(f"{address}/tags", timeout=5))
                if set(tags.get(run.name, {})) >= VALID:
                    break
            except OSError:
                pass
            time.sleep(0.25)
        assert set(tags[run.name]) >= TRAIN | VALID
        served = json.load(urllib.request.urlopen(f"{address}/scalars?run={run.name}&tag=valid/loss", timeout=5))
        wanted = [(row["step"], row["valid/loss"]) for row in rows_of(run) if "valid/loss" in row]
        assert [(step, pytest.approx(value, rel=1e-6)) for _, step, value in served] == wanted
    finally:
        server.terminate()
        server.wait(10)


def test_samples_are_written_at_each_validation(small):
    run = train(small("logging.sample_prompts=['', 'a b']")).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [row["samples"] for row in rows if "samples" in row]
    assert len(samples) == 2
    assert [sample["prompt"] for sample in samples[-1]] == ["", "a b"]
    assert samples[-1][1]["text"] == load(run).generate(["a b"])[0].text


def test_weights_that_are_not_finite_have_no_histogram_and_end_the_run_in_a_line(small, tmp_path):
    settings = ["logging.histograms=true", "optimizer.lr=1e40", "schedule.warmup_steps=0"]
    for number, more in enumerate(["validation.every_steps=1", "data.valid=null"]):
        with pytest.raises(DivergedError, match="step 1: "):
            train(small(*settings, more, "training.max_steps=1"), tmp_path / f"run-{number}")
