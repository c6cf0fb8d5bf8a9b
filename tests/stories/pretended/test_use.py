"""What a trained model does on the pretended device is what it does on the CPU."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lmtrain
from lmtrain.check import cost
from lmtrain.config import load_config
from lmtrain.inference.options import Beams, Sampling
from tests import pretend_device
from tests.conftest import SMALL, sentences

USUAL = ("training.max_steps=6", "training.device=cpu", "checkpoint.every_steps=null", "logging.sample_prompts=[]")
ONE_DIRECTION = ("model.bidirectional=false",)
STREAM = (*ONE_DIRECTION, "batching.mode=stream", "batching.batch_size=4", "batching.bptt=5")
NGRAMS = ("model.ngram_embeddings=[2,3]", "model.ngram_embedding_buckets=50")
RUNS = {
    "lstm": (),
    "gru, n-grams": ("model.cell=gru", *NGRAMS, "model.ngram_counts=3"),
    "rnn, adaptive": ("model.cell=rnn", "model.tie_weights=false", "model.output=adaptive", *ONE_DIRECTION),
    "stream": (*STREAM, "model.ngram_counts=3"),
    "carried": (*ONE_DIRECTION, *NGRAMS, "batching.carry_state=true", "model.layer_norm=true"),
}
TWO_DIRECTIONS = ("lstm", "gru, n-grams")
PROMPTS = ["a b", "", "c d e f", "a b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus and a run of each kind, trained on the CPU."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("train.txt").write_text(sentences(43, seed=1))
        Path("valid.txt").write_text(sentences(9, seed=2))
        Path("config.yaml").write_text(SMALL)
        for name, overrides in RUNS.items():
            lmtrain.train(load_config("config.yaml", [*USUAL, *overrides]), name)
    return folder


@pytest.fixture(params=RUNS)
def run(request, folder, monkeypatch):
    """The name of a run; the working directory holds it."""
    monkeypatch.chdir(folder)
    return request.param


@pytest.fixture
def both(run):
    """Do the same with the run's model on both devices, and compare what comes out."""

    def compare(do):
        here, there = (do(lmtrain.load(run, device=place)) for place in ("cpu", "auto"))
        assert_alike(there, here)
        assert pretend_device.waits
        return there

    return compare


def assert_alike(there, here):
    """Assert that two results are equal, numbers to the sixth digit."""
    if dataclasses.is_dataclass(here):
        there, here = vars(there), vars(here)
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        there, here = list(there.values()), list(here.values())
    if isinstance(here, float | np.ndarray):
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-6)
    elif isinstance(here, list | tuple):
        assert len(there) == len(here)
        for pair in zip(there, here, strict=True):
            assert_alike(*pair)
    elif here is not None and not isinstance(here, int | str | bool):
        assert_alike(vars(there), vars(here))
    else:
        assert there == here


WAYS = {
    "greedy": {},
    "drawn": {"sampling": Sampling(temperature=0.8, seed=3), "count": 3},
    "filtered": {"sampling": Sampling(repetition_penalty=1.3, top_k=5, top_p=0.9, min_p=0.01)},
    "beams": {"beams": Beams(3), "count": 2},
    "until a text": {"stop": [" a"]},
}


WAYS_OF_RUNS = [  # the fast ones hold each run and each way
    pytest.param(run, way, marks=() if run in ("lstm", "rnn, adaptive") or way == "greedy" else pytest.mark.slow)
    for run in RUNS
    for way in WAYS
]


@pytest.mark.parametrize(("run", "way"), WAYS_OF_RUNS, indirect=["run"])
def test_generate(both, way):
    written = both(lambda model: model.generate(PROMPTS, max_tokens=8, **WAYS[way]))
    assert any(each.tokens for each in written)


def test_stream(both):
    both(lambda model: list(model.stream("a b", max_tokens=8)))
    both(lambda model: list(model.stream("a", max_tokens=4, sampling=Sampling(seed=1), stop=["c d"])))


@pytest.mark.parametrize("run", TWO_DIRECTIONS, indirect=True)
def test_generate_and_score_backward(both):
    both(lambda model: model.generate(PROMPTS, max_tokens=4, backward=True))
    both(lambda model: list(model.score(["a b c", "d"], "both")))


def test_score_and_embed(both, tmp_path):
    texts = ["a b c", "", "d e f g h a b", "c"]
    both(lambda model: list(model.score(texts, each=True)))

    def vectors(model):
        place = tmp_path / f"{model.model.embedding.weight.device.type}.npz"
        model.embed(texts, place)
        return dict(np.load(place))

    both(vectors)


@pytest.mark.parametrize("run", TWO_DIRECTIONS, indirect=True)
def test_fill(both):
    for tokens in (1, 3):
        both(lambda model, tokens=tokens: model.fill("a b ____ d", top=4, tokens=tokens))


def test_evaluate(both, run):
    more = {}
    if run in ("stream", "carried"):
        more = {"cache": lmtrain.Cache(20), "dynamic": lmtrain.Dynamic(lr=0.1, decay=0.01, steps=7)}
    both(lambda model: model.evaluate(["valid.txt"], **more))


@pytest.mark.parametrize("run", ["lstm"], indirect=True)
def test_export(both, tmp_path):
    def weights(model):
        folder = tmp_path / model.model.embedding.weight.device.type
        model.export(folder, "safetensors")
        return load_file(folder / "model.safetensors")

    def onnx(model):
        folder = tmp_path / f"{model.model.embedding.weight.device.type} onnx"
        model.export(folder)
        return (folder / "model.onnx").read_bytes().hex()

    both(weights)
    pytest.importorskip("onnx")
    both(onnx)


def test_the_command_line(folder, shell, monkeypatch):
    monkeypatch.chdir(folder)
    said = []
    for place in ("cpu", "auto"):
        device = ("--device", place)
        commands = [
            ("train", "config.yaml", "--run-dir", f"runs/{place}", *device, "training.max_steps=3"),
            ("train", "config.yaml", "--run-dir", f"runs/{place}", *device, "training.max_steps=4", "--resume"),
            ("generate", f"runs/{place}", "--prompt", "a b", "--max-tokens", 5, *device),
            ("evaluate", f"runs/{place}", "--json", *device),
            ("fill", f"runs/{place}", "a ____ c", *device),
            ("check", f"runs/{place}"),
        ]
        done = [shell(*command) for command in commands]
        assert [each.returncode for each in done] == [0] * len(commands), [each.stderr for each in done]
        said.append([each.stdout for each in done])
    figures = [json.loads(lines[3]) for lines in said]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    assert said[0][2] == said[1][2]


def test_check_measures_a_training(folder, shell, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cost, "MEASURED_S", 0.01)
    report = shell("check", "config.yaml", "training.device=auto")
    assert report.returncode == 0, report.stderr
    assert "tokens/s" in report.stdout
