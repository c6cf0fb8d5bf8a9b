"""PyTorch has written for Apple's GPU every operation that lmtrain asks for: read from its own table of operations."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

import lmtrain
from lmtrain.model.packing import pack_rows
from lmtrain.model.recurrence import RecurrentStack

COMPOSITE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
ONE_WAY = "model.bidirectional=false"
SETTINGS = {
    "lstm": [],
    "gru": ["model.cell=gru", "averaging.name=ema"],
    "rnn": ["model.cell=rnn", "optimizer.name=muon", "regularization.weight_dropout=0.2"],
    "bf16": ["training.precision=bf16", "regularization.embedding_dropout=0.1"],
    "sgd": ["optimizer.name=sgd", "optimizer.weight_decay=0", "model.tie_weights=false", "logging.histograms=true"],
    "adaptive": ["model.output=adaptive", "model.tie_weights=false"],
    "sampled": ["training.sampled_tokens=2", "training.frequent_tokens=4"],
    "n-grams": ["model.ngram_embeddings=[4]", "model.ngram_embedding_buckets=64", "model.ngram_counts=3", ONE_WAY],
    "stream": ["batching.mode=stream", "batching.bptt=8", ONE_WAY],
}


class Recorded(TorchDispatchMode):
    """Notes the name of every operation that runs, and whether it works on sparse tensors or makes one."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        sparse = any(each.is_sparse for each in arguments if isinstance(each, torch.Tensor))
        self.operations.add((function.name(), sparse or keywords.get("layout") == torch.sparse_coo))
        return function(*arguments, **keywords)


def table():
    """The dispatch keys of every operation: {"aten::mm": {"CPU", "CUDA", "MPS", ...}, ...}."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    rows = yaml.load(path.read_text(), yaml.CSafeLoader)
    rows = {f"aten::{row['func'].partition('(')[0]}": row for row in rows}
    keys = {}
    for name, row in rows.items():
        # a structured operation has the keys of the form that writes to a given tensor
        home = rows[f"aten::{row['structured_delegate']}"] if "structured_delegate" in row else row
        dispatch = home.get("dispatch", {"CompositeImplicitAutograd": None})
        keys[name] = {key for part in dispatch for key in part.split(", ")}
        for made in filter(None, row.get("autogen", "").split(", ")):
            keys[f"aten::{made}"] = {"CompositeExplicitAutograd"}
    return keys


@pytest.mark.parametrize(("backend", "by_pytorch"), [("auto", False), ("packed", False), ("torch", True)])
def test_auto_takes_lmtrains_kernels_on_apples_gpu(backend, by_pytorch):
    stack = RecurrentStack("lstm", 4, [4], backend=backend)
    assert stack._uses_torch(SimpleNamespace(device=torch.device("mps")), pack_rows(torch.tensor([3, 3]))) == by_pytorch


@pytest.fixture(scope="module")
def keys():
    return table()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_operation_is_there_on_apples_gpu(small, keys, name):
    with Recorded() as recorded:
        run = lmtrain.train(small("model.backend=packed", "training.max_steps=3", *SETTINGS[name])).run
        model = lmtrain.load(run, "cpu")
        model.generate(["a"], 3)
        model.generate(["a"], 3, sampling=lmtrain.Sampling(top_k=3, top_p=0.9, repetition_penalty=1.2, seed=1))
        model.generate(["a"], 3, beams=lmtrain.Beams(2))
        model.evaluate(["valid.txt"])
        list(model.score(["a b"], each=True))
        model.embed(["a"], "vectors.npz")
        if model.model.bidirectional:
            model.fill("a ____ b", tokens=2)
        if name == "stream":
            model.evaluate(["valid.txt"], cache=lmtrain.Cache(9), dynamic=lmtrain.Dynamic(0.1))
    operations = {(operation, sparse) for operation, sparse in recorded.operations if operation.startswith("aten::")}
    assert len(operations) > 50
    lacking = {
        operation
        for operation, sparse in operations
        if not keys[operation] & (COMPOSITE | {"SparseMPS" if sparse else "MPS"})
    }
    assert lacking == set()
