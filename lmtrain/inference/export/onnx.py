"""One step of a trained model as an ONNX graph.

Shapes: B rows, H hidden size of a layer, K tokens of n-gram history, O orders of n-grams, P output size, V vocabulary.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.model.cells import WEIGHTS, layer_weights
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.embedding import FACTOR, MIX, PRIME, NgramEmbedding
from lmtrain.model.output import FullOutput

OPSET = 17
STORED_WEIGHTS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")  # the order in the file


class _Graph:
    """Builds an ONNX graph: nodes in the order in which they run, and the constants that they read."""

    def __init__(self) -> None:
        from onnx import helper

        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """Add a node; return the name of its output, or a list of names when it has several."""
        stem = name or f"{operator.lower()}_{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}_{number}" for number in range(outputs)]
        self.nodes.append(self.helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """Store a constant unless its name is known already; return the name."""
        from onnx import numpy_helper

        if name not in self.constants:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = numpy_helper.from_array(array.copy(), name)
        return name

    def integer(self, value: int) -> str:
        """Store an int64 as a constant; return its name."""
        return self.constant(f"integer_{value}", np.array(value, np.int64))


def onnx_model(model: LanguageModel, tokenizer: Tokenizer, tied: bool = True) -> Any:
    """Build one step of the forward direction as an `onnx.ModelProto`.

    Inputs: `token` (B,) int64; for each layer n from 0 up `h_n` (B, H) float32, and for the LSTM `c_n`; with n-gram
    embeddings `history` (B, K) int64, which holds the ids + 1 of the last K tokens, and 0 where there was none.
    Outputs: `log_probabilities` (B, V) of the next token, -inf for tokens that never follow, and each state after the
    step under its name with `_out` appended. A text begins with `<bos>` (a stream with `<eos>`) and states of zeros.

    Args:
        tied: share one constant between the embedding and the output layer if they share their weight.

    Raises:
        ConfigError: onnx is not installed, or the model has an adaptive output layer or counted n-grams.
    """
    if not isinstance(model.output, FullOutput):
        raise ConfigError("an adaptive output layer has no ONNX form here; train with model.output: full to export")
    if model.mixtures:
        raise ConfigError(
            "counted n-grams and recent tokens have no ONNX form here; to export, train with model.ngram_counts: null "
            "and model.recent_tokens: null"
        )
    try:
        from onnx import TensorProto, checker
    except ImportError:
        raise ConfigError('export to ONNX needs two more packages: pip install "lmtrain[onnx]"') from None
    graph, stack = _Graph(), model.stack("forward")
    values = graph.add("Gather", graph.constant("embedding.weight", model.embedding.weight), "token")
    states: list[tuple[str, int, Any]] = []  # name, size, type
    for number, layer in enumerate(stack.layers):
        names = [f"{state}_{number}" for state in stack.cell.states]
        states += [(name, stack.hidden_sizes[number], TensorProto.FLOAT) for name in names]
        weights = dict(zip(WEIGHTS, layer_weights(layer), strict=True))
        for part in STORED_WEIGHTS:
            graph.constant(f"layer_{number}.{part}", weights[part])
        stack.cell.onnx(graph, values, names, [f"layer_{number}.{part}" for part in WEIGHTS])
        output = f"{names[0]}_out"
        if stack.norms:
            norm = stack.norms[number]
            assert isinstance(norm, nn.LayerNorm)
            scale = graph.constant(f"norm_{number}.weight", norm.weight)
            bias = graph.constant(f"norm_{number}.bias", norm.bias)
            output = graph.add("LayerNormalization", output, scale, bias, axis=-1, epsilon=norm.eps)
        same = layer.input_size == layer.hidden_size
        values = graph.add("Add", output, values) if stack.residual and same else output
    projection = model.projections["of_forward"]
    if isinstance(projection, nn.Linear):
        values = graph.add("Gemm", values, graph.constant("projection.weight", projection.weight), transB=1)
    if model.ngram_embeddings:
        ngrams = model.ngram_embeddings["of_forward"]
        assert isinstance(ngrams, NgramEmbedding)
        states.append(("history", ngrams.history_size, TensorProto.INT64))
        values = graph.add("Add", values, _add_ngrams(graph, ngrams))
    tied &= model.output.weight is model.embedding.weight
    weight = graph.constant("embedding.weight" if tied else "output.weight", model.output.weight)
    logits = graph.add("Gemm", values, weight, graph.constant("output.bias", model.output.bias), transB=1)
    never = np.zeros(model.vocab_size, np.float32)
    never[[tokenizer.pad_id, tokenizer.bos_id]] = -np.inf
    graph.add("Add", graph.add("LogSoftmax", logits, axis=-1), graph.constant("never", never), name="log_probabilities")
    info = graph.helper.make_tensor_value_info
    read = [info(name, kind, ["batch", size]) for name, size, kind in states]
    written = [info(f"{name}_out", kind, ["batch", size]) for name, size, kind in states]
    token = info("token", TensorProto.INT64, ["batch"])
    log_probabilities = info("log_probabilities", TensorProto.FLOAT, ["batch", model.vocab_size])
    constants = list(graph.constants.values())
    built = graph.helper.make_graph(graph.nodes, "lmtrain", [token, *read], [log_probabilities, *written], constants)
    exported = graph.helper.make_model(
        built, opset_imports=[graph.helper.make_opsetid("", OPSET)], producer_name="lmtrain", ir_version=8
    )
    checker.check_model(exported)
    return exported


def _add_ngrams(graph: _Graph, ngrams: NgramEmbedding) -> str:
    """Add `NgramEmbedding` for one token of each row; return the name of the n-grams' summed vectors (B, P)."""
    one = graph.constant("axis_1", np.array([1], np.int64))
    newest = graph.add("Unsqueeze", graph.add("Add", "token", graph.integer(1)), one)
    context = graph.add("Concat", "history", newest, axis=1)  # (B, K + 1)
    ends = graph.constant("last", np.array([ngrams.history_size + 1], np.int64))
    graph.add("Slice", context, one, ends, one, name="history_out")
    hashed, buckets = graph.integer(0), list[str]()
    for back in range(ngrams.history_size + 1):
        token = graph.add("Gather", context, graph.integer(ngrams.history_size - back), axis=1)  # (B,)
        mixed = graph.add("Add", graph.add("Mul", hashed, graph.integer(FACTOR)), token)
        hashed = graph.add("Mod", mixed, graph.integer(PRIME))
        if back + 1 in ngrams.orders:
            spread = graph.add("Div", graph.add("Mul", hashed, graph.integer(MIX)), graph.integer(1 << 16))
            bucket = graph.add("Mod", spread, graph.integer(ngrams.buckets))
            row = graph.add("Add", bucket, graph.integer(len(buckets) * ngrams.buckets))
            buckets.append(graph.add("Unsqueeze", row, one))
    rows = graph.add("Concat", *buckets, axis=1)  # (B, O)
    vectors = graph.add("Gather", graph.constant("ngrams.weight", ngrams.weight), rows)
    return str(graph.add("ReduceSum", vectors, one, keepdims=0))
