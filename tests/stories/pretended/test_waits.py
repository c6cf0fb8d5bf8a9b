"""How often a training step waits for the device, and how often it copies to it, with the lines that ask for it."""

import pytest
import torch

from lmtrain.config.schema import Config
from lmtrain.data.batches.loader import RankBatch
from lmtrain.data.batches.rows import make_batch
from lmtrain.model.cells import CELLS
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.counting import count_ngrams
from lmtrain.training.step import TrainingStep
from tests import pretend_device

VOCAB_SIZE = 40
REGULARISERS = {
    "dropout": 0.1, "input_dropout": 0.1, "output_dropout": 0.1, "layer_dropout": 0.1, "weight_dropout": 0.1,
    "embedding_dropout": 0.1, "activation_penalty": 2.0, "temporal_penalty": 1.0, "label_smoothing": 0.1,
}  # fmt: skip
NGRAMS = {"ngram_embeddings": [2, 3], "ngram_embedding_buckets": 64, "ngram_embedding_dropout": 0.1}
UNTIED = {"tie_weights": False}
SGD = {"optimizer": {"name": "sgd", "weight_decay": 0.0}}

# name -> arguments of the model, keys of the configuration, batches of a step
VARIANTS = {
    **{cell: ({"cell": cell}, {}, 1) for cell in CELLS},
    **{f"packed {cell}": ({"cell": cell, "backend": "packed"}, {}, 1) for cell in CELLS},
    "two directions": ({"bidirectional": True}, {}, 1),
    "stream": ({}, {}, 1),
    "adaptive": ({"output": "adaptive", **UNTIED}, {}, 1),
    "two directions, adaptive": ({"bidirectional": True, "output": "adaptive", **UNTIED}, {}, 1),
    "sampled": ({"sampled_tokens": 9, "frequent_tokens": 5}, {}, 1),
    "n-gram counts": ({"ngram_counts": 3}, {}, 1),
    "recent tokens": ({"recent_tokens": 8}, {}, 1),
    "two directions, n-gram counts": ({"ngram_counts": 3, "bidirectional": True}, {}, 1),
    "regularisers": (REGULARISERS, {}, 1),
    "packed, regularisers, two directions": ({**REGULARISERS, "backend": "packed", "bidirectional": True}, {}, 1),
    "accumulate": ({}, {}, 2),
    "muon": ({}, {"optimizer": {"name": "muon"}}, 1),
    "ema": ({}, {"averaging": {"name": "ema"}}, 1),
    "layer norm, residual": ({"layer_norm": True, "residual": True, "num_layers": 2}, {}, 1),
    "n-gram embeddings": (NGRAMS, {}, 1),
    "n-gram embeddings, two directions": ({**NGRAMS, "bidirectional": True}, {}, 1),
    "sparse embedding": (UNTIED, SGD, 1),
    "sparse embedding, n-gram embeddings": ({**UNTIED, **NGRAMS}, SGD, 2),
}


def step_of(device, model_options, config, columns=None):
    torch.manual_seed(3)
    model = LanguageModel(VOCAB_SIZE, **{"embedding_size": 16, "hidden_size": 16, **model_options})
    if model_options.get("ngram_counts"):
        tokens = torch.randint(4, VOCAB_SIZE, (500,))
        of_each = count_ngrams(tokens, torch.arange(500) % 10, 3, VOCAB_SIZE)
        model.load_counts({f"of_{way}.{name}": part for way in model.objectives[:2] for name, part in of_each.items()})
    step = TrainingStep(
        Config.model_validate({"name": "waits", "data": {"train": "none.txt"}, **config}),
        model.to(device).train(),
        columns,
    )
    return step


def batches_of(step, count, ragged=True):
    """`count` batches of a step, as the loader's thread gives them."""
    batches = []
    for number in range(count):
        lengths = [9, 7, 7, 4 + number] if ragged else [8] * 4
        batch = make_batch([[1, *torch.randint(4, VOCAB_SIZE, (length,)).tolist(), 2] for length in lengths], 0)
        layout = None if step.lay_out is None else step.lay_out(*batch)
        batches.append(RankBatch(batch, 4, int(batch.lengths.sum()), len(batch.tokens), layout=layout))
    return batches


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_waits_for_the_device_once(name):
    model_options, config, accumulate = VARIANTS[name]
    device = torch.device(pretend_device.NAME, pretend_device.DEVICE_INDEX)
    columns = 4 if name == "stream" else None
    step = step_of(device, model_options, config, columns)
    for number in range(1, 5):
        step.precision = "fp32" if number < 3 else "bf16"
        pretend_device.copies.clear()
        batches = batches_of(step, accumulate, ragged=columns is None)
        assert [event.line.partition(":")[0] for event in pretend_device.copies] == ["model/packing.py"] * accumulate
        pretend_device.copies.clear()
        pretend_device.waits.clear()
        step(batches, 1e-3, number)
        allowed = accumulate if "sampled_tokens" in model_options else 0  # a sample is drawn anew for each batch
        assert [event.line for event in pretend_device.copies if "packing" not in event.line] == []
        assert len(pretend_device.copies) == allowed
        assert [event.line.partition(":")[0] for event in pretend_device.waits] == ["training/step.py"]
