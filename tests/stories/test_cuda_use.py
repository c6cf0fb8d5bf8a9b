"""A run that was trained on CUDA says the same there and on the CPU, by every way to use it. See ../README.md."""

import dataclasses
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from safetensors.torch import load_file

from lmtrain.inference.adaptation import Cache, Dynamic
from lmtrain.inference.options import Beams, Sampling
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("without_tf32")]
DEVICE = "cuda"
ON = f"training.device={DEVICE}"
PROMPTS = ["", "a", "b c d", "e f"]
TEXTS = ["a b c", "d", "h g f e d c b a", "", "b b"]
STREAM = ["batching.mode=stream", "batching.bptt=9", "model.bidirectional=false"]
RUNS = {
    "two directions": ["model.ngram_counts=3"],
    "gru": ["model.cell=gru"],
    "residual, layer norm": ["model.layer_norm=true", "model.residual=true"],
    "adaptive rnn": ["model.cell=rnn", "model.output=adaptive", "model.tie_weights=false"],
    "stream, n-grams": [*STREAM, "model.ngram_embeddings=[2, 3]", "model.ngram_counts=4"],
    "stream": STREAM,
}
TWO = [name for name in RUNS if "stream" not in name]
STREAMS = [name for name in RUNS if "stream" in name]
IN_TORCH = ["gru", "stream"]  # with no part that torch.nn lacks


def embedded(model):
    with TemporaryDirectory() as folder:
        model.embed(TEXTS, f"{folder}/vectors.npz")
        with np.load(f"{folder}/vectors.npz") as vectors:
            return dict(vectors)


def exported(model):
    with TemporaryDirectory() as folder:
        model.export(f"{folder}/weights", "safetensors")
        weights = load_file(f"{folder}/weights/model.safetensors")
        assert {weight.device.type for weight in weights.values()} == {"cpu"}
        if find_spec("onnx") is None:
            return weights, b""
        model.export(f"{folder}/onnx")
        return weights, Path(folder, "onnx", "model.onnx").read_bytes()


USES = {
    "greedy": (RUNS, lambda model: model.generate(PROMPTS)),
    "drawn": (
        RUNS,
        lambda model: model.generate(PROMPTS, sampling=Sampling(top_p=0.9, seed=4), count=3),
    ),
    "no repetition, top k": (RUNS, lambda model: model.generate(PROMPTS, sampling=Sampling(1.5, 0.7, top_k=4, seed=1))),
    "beams": (RUNS, lambda model: model.generate(PROMPTS, beams=Beams(4, 0.5), count=2)),
    "stop": (RUNS, lambda model: model.generate(PROMPTS, stop=["c"])),
    "streamed": (RUNS, lambda model: [list(model.stream(prompt)) for prompt in PROMPTS]),
    "streamed, drawn": (
        RUNS,
        lambda model: [*model.stream("a", sampling=Sampling(seed=2))],
    ),
    "backward": (TWO, lambda model: model.generate(PROMPTS, backward=True)),
    "fill": (TWO, lambda model: model.fill("a ____ c d")),
    "fill with several tokens": (TWO, lambda model: model.fill("a ____ c d", tokens=3)),
    "score": (RUNS, lambda model: list(model.score(TEXTS))),
    "score each token": (RUNS, lambda model: list(model.score(TEXTS, each=True))),
    "score both directions": (TWO, lambda model: list(model.score(TEXTS, "both"))),
    "embed": (RUNS, embedded),
    "evaluate": (RUNS, lambda model: model.evaluate().figures()),
    "cache, dynamic": (STREAMS, lambda model: model.evaluate(cache=Cache(20), dynamic=Dynamic(0.5, steps=7)).figures()),
    "dynamic with decay": (STREAMS, lambda model: model.evaluate(dynamic=Dynamic(0.2, decay=0.1)).figures()),
    "worst lines": (RUNS, lambda model: model.worst_lines(count=3)),
    "export": (IN_TORCH, exported),
}


def agree(one, other, place="result"):
    """Assert that two results are equal, and their numbers nearly so."""
    if dataclasses.is_dataclass(one):
        one, other = dataclasses.astuple(one), dataclasses.astuple(other)
    if isinstance(one, dict):
        assert list(one) == list(other), place
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, parts in enumerate(zip(one, other, strict=True)):
            agree(*parts, f"{place}[{number}]")
    elif isinstance(one, float) or hasattr(one, "shape"):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4), place
    else:
        assert one == other, place


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_cuda_says_the_same_there_and_on_the_cpu(small, tmp_path, name, precision):
    run = train(small(*RUNS[name], ON, f"training.precision={precision}"), tmp_path / "run").run
    said = {}
    for device in (DEVICE, "cpu"):
        model = load(run, device)
        assert model.model.embedding.weight.device.type == device
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said[device] = {use: act(model) for use, (runs, act) in USES.items() if name in runs}
    assert len(said["cpu"]) > 10
    for use, on_cpu in said["cpu"].items():
        agree(said[DEVICE][use], on_cpu, use)
    assert ["".join(parts) for parts in said[DEVICE]["streamed"]] == [
        each.completion for each in said[DEVICE]["greedy"]
    ]
