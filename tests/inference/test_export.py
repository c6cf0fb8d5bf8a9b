"""Exports: the ONNX step writes what lmtrain writes, token for token; torch.nn takes the weights by their names."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.errors import ConfigError
from lmtrain.inference.export.int8 import OnnxSteps
from lmtrain.inference.export.onnx import onnx_model
from lmtrain.inference.export.weights import torch_weights
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from tests.conftest import ROOT
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(9, 0)
KINDS = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "rnn, one layer": {"cell": "rnn", "num_layers": 1},
    "two directions, not tied": {"bidirectional": True, "tie_weights": False},
    "uneven layers": {"layer_sizes": [10, 16]},
    "residual, normed": {"residual": True, "layer_norm": True},
    "n-grams": {"ngram_embeddings": [2, 3, 5], "ngram_embedding_buckets": 64},
    "n-grams, gru": {"ngram_embeddings": [4], "ngram_embedding_buckets": 1000, "cell": "gru"},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_tokens_of_greedy_text_are_the_same(name):
    pytest.importorskip("onnxruntime")
    model = untrained_model(IDS, 1, **KINDS[name])
    with torch.no_grad():
        for weight in model.recurrence.parameters():
            weight.mul_(0.4)  # or rounding would grow from step to step
    script = PromptCodec(IDS, stream=True)  # no end: as many tokens as are asked for
    prompts = [str(1 + number % 8) for number in range(10)]
    wanted = [each.completion.split() for each in generate(model, script, prompts, max_tokens=100)]
    steps = OnnxSteps(onnx_model(model, IDS).SerializeToString())
    state, written = steps.begin(10), []
    for tokens in (np.full(10, IDS.eos_id), np.array([int(prompt) for prompt in prompts])):
        log_probabilities, state = steps.step(tokens, state)
    for _ in range(100):
        chosen = log_probabilities.argmax(1)
        written.append(chosen)
        log_probabilities, state = steps.step(chosen, state)
    end = str(IDS.eos_id)
    ours = [[str(token) for token in row if str(token) != end] for row in np.stack(written, 1).tolist()]
    assert ours == wanted


def test_log_probabilities_and_a_batch_are_lmtrains():
    pytest.importorskip("onnxruntime")
    model = untrained_model(IDS, 4, ngram_embeddings=[2, 3])
    steps, state = OnnxSteps(onnx_model(model, IDS).SerializeToString()), None
    own = steps.begin(3)
    torch.manual_seed(0)
    for tokens in torch.randint(1, 9, (20, 3)):
        with torch.no_grad():
            logits, state = model(tokens.unsqueeze(0), state)
        found, own = steps.step(tokens.numpy(), own)
        wanted = logits[0].log_softmax(-1)
        wanted[:, [IDS.pad_id, IDS.bos_id]] = -torch.inf
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_int8_is_smaller_and_near(small, tmp_path):
    pytest.importorskip("onnxruntime")
    model = load(train(small("training.max_steps=20", "model.hidden_size=128", "model.embedding_size=64")).run)
    lines = model.export(tmp_path / "small", int8=True)
    assert len(lines) == 4
    sizes = [float(part.split()[0]) for part in lines[1].removeprefix("int8: ").split("-> ")]
    assert sizes[1] < 0.4 * sizes[0]
    words = lines[3].split()
    before, after = float(words[2]), float(words[4])
    assert after == pytest.approx(before, rel=0.03)
    assert before == pytest.approx(model.evaluate().perplexity, rel=1e-4)  # all of it: it is short


def test_the_example_runs_it_without_lmtrain(small, tmp_path):
    pytest.importorskip("onnxruntime")
    run = train(small("training.max_steps=30", "optimizer.lr=0.05", "tokenizer.kind=char", "tokenizer.min_frequency=1"))
    model = load(run.run)
    model.export(tmp_path / "exported")
    arguments = [str(tmp_path / "exported"), "a b"]
    blocked = f"import sys; sys.modules['lmtrain'] = sys.modules['torch'] = None; sys.argv[1:] = {arguments}"
    code = f"{blocked}; import runpy; runpy.run_path({str(ROOT / 'scripts/run_onnx.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wanted,) = model.generate(["a b"], max_tokens=1000 - 3)
    assert done.stdout == wanted.text + "\n"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_torch_nn_takes_the_weights_by_their_names(cell, small, tmp_path):
    from safetensors.torch import load_file

    model = load(train(small("training.max_steps=3", f"model.cell={cell}")).run)
    model.export(tmp_path / "weights", "safetensors")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    # the README's snippet
    layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[cell](input_size=6, hidden_size=8, num_layers=2)
    layers.load_state_dict({k.removeprefix("forward."): v for k, v in tensors.items() if k.startswith("forward.")})
    ids = torch.tensor([1, *model.tokenizer.encode("a b c")])
    states, _ = layers(tensors["embedding.weight"][ids])
    logits = states @ tensors["projection_forward.weight"].T @ tensors["output.weight"].T + tensors["output.bias"]
    with torch.no_grad():
        wanted, _ = model.model(ids.unsqueeze(1))
    torch.testing.assert_close(logits.detach(), wanted[:, 0])
    backward = {k.removeprefix("backward."): v for k, v in tensors.items() if k.startswith("backward.")}
    layers.load_state_dict(backward)
    state = json.loads((tmp_path / "weights" / "tokenizer.json").read_text())
    assert state["kind"] == "word"


@pytest.mark.parametrize(
    ("settings", "format", "said"),
    [
        ({"ngram_counts": 3}, "onnx", "counted n-grams and recent tokens have no ONNX form"),
        ({"recent_tokens": 9}, "onnx", "counted n-grams and recent tokens have no ONNX form"),
        ({"ngram_counts": 3}, "safetensors", "counted n-grams and recent tokens have no form outside lmtrain"),
        ({"output": "adaptive", "tie_weights": False}, "onnx", "adaptive output layer has no ONNX form"),
        ({"output": "adaptive", "tie_weights": False}, "safetensors", "what model.output asked for"),
        ({"layer_sizes": [8, 16]}, "safetensors", "what model.layer_sizes asked for"),
        (
            {"residual": True, "ngram_embeddings": [2]},
            "safetensors",
            "what model.residual, model.ngram_embeddings asked for",
        ),
    ],
)
def test_what_has_no_such_form_is_refused(settings, format, said):
    tokenizer = IdsTokenizer(3000, 0)
    model = untrained_model(tokenizer, **settings)
    with pytest.raises(ConfigError, match=said):
        onnx_model(model, tokenizer) if format == "onnx" else torch_weights(model)


def test_without_onnx_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r'pip install "lmtrain\[onnx\]"'):
        onnx_model(untrained_model(IDS), IDS)


def test_nothing_is_overwritten(small, tmp_path):
    model = load(train(small("training.max_steps=3")).run)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine: already exists"):
        model.export(tmp_path / "mine", "safetensors")
    assert list((tmp_path / "mine").iterdir()) == []
