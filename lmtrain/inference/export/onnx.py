"""A trained model for other programs: one step as an ONNX graph, or its weights as `torch.nn` names them.

Shapes: B rows, H size of a layer, K tokens of n-gram history, P output size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.embedding import FACTOR, MIX, PRIME, NgramEmbedding
from lmtrain.model.output import FullOutput

OPSET = 17


class _Graph:
    """An ONNX graph on its way: nodes in their order, and the constants they read."""

    def __init__(self) -> None:
        from onnx import helper

        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """The name of the node's output, or the names of its several."""
        stem = name or f"{operator.lower()}_{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}_{number}" for number in range(outputs)]
        self.nodes.append(self.helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """A constant by its name; a second one of the same name is the first."""
        from onnx import numpy_helper

        if name not in self.constants:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = numpy_helper.from_array(array.copy(), name)
        return name

    def integer(self, value: int) -> str:
        """A whole number as a constant."""
        return self.constant(f"integer_{value}", np.array(value, np.int64))


def onnx_model(model: LanguageModel, tokenizer: Tokenizer, tied: bool = True) -> Any:
    """One step of the forward direction as an `onnx.ModelProto`.

    Inputs: `token` (B,) int64; of layer n from 0 up `h_n` (B, H) float32 and for the LSTM `c_n`; with n-grams `history`
    (B, K) int64: ids + 1 of the last K tokens, 0 where there was none. Outputs: `log_probabilities` (B, V) of the next
    token, -inf for tokens that never follow, and each state after the step, its name with `_out` behind it. A text
    begins with `<bos>` (of a stream `<eos>`) and states of zeros.

    Args:
        tied: let embedding and output layer share one constant where they share their weights.

    Raises:
        ConfigError: onnx is not installed, an adaptive output layer, or counted n-grams.
    """
    if not isinstance(model.output, FullOutput):
        raise ConfigError("an adaptive output layer has no ONNX form here; train with model.output: full to export")
    if model.ngram_counts:
        raise ConfigError("counted n-grams have no ONNX form here; train with model.ngram_counts: null to export")
    try:
        from onnx import TensorProto, checker
    except ImportError:
        raise ConfigError('export to ONNX wants two more packages: pip install "lmtrain[onnx]"') from None
    graph, stack, cell = _Graph(), model.stack("forward"), model.stack("forward").cell
    values = graph.add("Gather", graph.constant("embedding.weight", model.embedding.weight), "token")
    states: list[tuple[str, int, Any]] = []  # name, size, type
    for number, layer in enumerate(stack.layers):
        parts = [f"h_{number}", *([f"c_{number}"] if cell == "lstm" else [])]
        states += [(name, stack.hidden_sizes[number], TensorProto.FLOAT) for name in parts]
        output = _step(graph, cell, layer, values, parts)
        if stack.norms:
            norm = stack.norms[number]
            assert isinstance(norm, nn.LayerNorm)
            scale, bias = (
                graph.constant(f"norm_{number}.weight", norm.weight),
                graph.constant(f"norm_{number}.bias", norm.bias),
            )
            output = graph.add("LayerNormalization", output, scale, bias, axis=-1, epsilon=norm.eps)
        same = layer.input_size == layer.hidden_size
        values = graph.add("Add", output, values) if stack.residual and same else output
    projection = model.projections["of_forward"]
    if isinstance(projection, nn.Linear):
        values = graph.add("Gemm", values, graph.constant("projection.weight", projection.weight), transB=1)
    if model.ngram_embeddings:
        ngrams = model.ngram_embeddings["of_forward"]
        assert isinstance(ngrams, NgramEmbedding)
        states.append(("history", ngrams.history, TensorProto.INT64))
        values = graph.add("Add", values, _direct(graph, ngrams))
    tied &= model.output.weight is model.embedding.weight
    weight = graph.constant("embedding.weight" if tied else "output.weight", model.output.weight)
    logits = graph.add("Gemm", values, weight, graph.constant("output.bias", model.output.bias), transB=1)
    never = np.zeros(model.vocab_size, np.float32)
    never[[tokenizer.pad_id, tokenizer.bos_id]] = -np.inf
    graph.add("Add", graph.add("LogSoftmax", logits, axis=-1), graph.constant("never", never), name="log_probabilities")
    make = graph.helper.make_tensor_value_info
    built = graph.helper.make_graph(
        graph.nodes,
        "lmtrain",
        [
            make("token", TensorProto.INT64, ["batch"]),
            *(make(name, kind, ["batch", size]) for name, size, kind in states),
        ],
        [
            make("log_probabilities", TensorProto.FLOAT, ["batch", model.vocab_size]),
            *(make(f"{name}_out", kind, ["batch", size]) for name, size, kind in states),
        ],
        list(graph.constants.values()),
    )
    found = graph.helper.make_model(
        built, opset_imports=[graph.helper.make_opsetid("", OPSET)], producer_name="lmtrain", ir_version=8
    )
    checker.check_model(found)
    return found


def _step(graph: _Graph, cell: str, layer: Any, values: str, parts: Sequence[str]) -> str:
    """One layer: from its input (B, I) and the states named to its new h, (B, H)."""
    number = parts[0].partition("_")[2]

    def product(inputs: str, kind: str) -> str:
        weight, bias = (
            graph.constant(f"layer_{number}.{part}_{kind}", getattr(layer, f"{part}_{kind}_l0"))
            for part in ("weight", "bias")
        )
        found: str = graph.add("Gemm", inputs, weight, bias, transB=1)
        return found

    of_input, of_state, new = product(values, "ih"), product(parts[0], "hh"), f"{parts[0]}_out"
    if cell == "rnn":
        return str(graph.add("Tanh", graph.add("Add", of_input, of_state), name=new))
    if cell == "gru":  # as PyTorch has it: h = (1 - z) * n + z * h'
        inner, before = (graph.add("Split", part, outputs=3, axis=1) for part in (of_input, of_state))
        reset, update = (graph.add("Sigmoid", graph.add("Add", inner[k], before[k])) for k in (0, 1))
        proposed = graph.add("Tanh", graph.add("Add", inner[2], graph.add("Mul", reset, before[2])))
        kept = graph.add("Mul", update, graph.add("Sub", parts[0], proposed))
        return str(graph.add("Add", proposed, kept, name=new))
    gates = graph.add("Split", graph.add("Add", of_input, of_state), outputs=4, axis=1)
    enter, forget, leave = (graph.add("Sigmoid", gates[k]) for k in (0, 1, 3))
    kept = graph.add("Mul", forget, parts[1])
    cell_state = graph.add("Add", kept, graph.add("Mul", enter, graph.add("Tanh", gates[2])), name=f"{parts[1]}_out")
    return str(graph.add("Mul", leave, graph.add("Tanh", cell_state), name=new))


def _direct(graph: _Graph, ngrams: NgramEmbedding) -> str:
    """The sum of the n-grams' vectors, (B, P): `NgramEmbedding._buckets` in ONNX's operators."""
    one = graph.constant("axis_1", np.array([1], np.int64))
    newest = graph.add("Unsqueeze", graph.add("Add", "token", graph.integer(1)), one)
    context = graph.add("Concat", "history", newest, axis=1)  # (B, K + 1)
    ends = graph.constant("last", np.array([ngrams.history + 1], np.int64))
    graph.add("Slice", context, one, ends, one, name="history_out")
    hashed, places = graph.integer(0), list[str]()
    for back in range(ngrams.history + 1):
        read = graph.add("Gather", context, graph.integer(ngrams.history - back), axis=1)  # (B,)
        mixed = graph.add("Add", graph.add("Mul", hashed, graph.integer(FACTOR)), read)
        hashed = graph.add("Mod", mixed, graph.integer(PRIME))
        if back + 1 in ngrams.orders:
            spread = graph.add("Div", graph.add("Mul", hashed, graph.integer(MIX)), graph.integer(1 << 16))
            bucket = graph.add("Mod", spread, graph.integer(ngrams.buckets))
            moved = graph.add("Add", bucket, graph.integer(len(places) * ngrams.buckets))
            places.append(graph.add("Unsqueeze", moved, one))
    rows = graph.add("Concat", *places, axis=1)  # (B, orders)
    vectors = graph.add("Gather", graph.constant("ngrams.weight", ngrams.weight), rows)
    return str(graph.add("ReduceSum", vectors, one, keepdims=0))
