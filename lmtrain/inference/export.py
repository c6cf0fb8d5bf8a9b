"""A trained model for other programs: one step as an ONNX graph, or its weights as `torch.nn` names them.

Shapes: B rows, H size of a layer, K tokens of n-gram history, P output size, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError, StorageError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams import FACTOR, MIX, PRIME, NgramEmbedding
from lmtrain.model.output import FullOutput
from lmtrain.system.files import reason_of, space_note, write_synced

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
    if model.counted:
        raise ConfigError("counted n-grams have no ONNX form here; train with model.counts: null to export")
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
    if model.ngrams:
        ngrams = model.ngrams["of_forward"]
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


def torch_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights by names that `torch.nn` knows.

    `forward.weight_ih_l0` ... are those of an `nn.LSTM`, `nn.GRU` or `nn.RNN` of all layers, `backward.` of a second,
    which reads from the right; `embedding.weight`, `output.weight` and `output.bias` stand before and behind it, and
    `projection_forward.weight` between it and the output layer where sizes differ.

    Raises:
        ConfigError: what no `torch.nn` layer has: layers that differ in size, residual connections, layer norm,
            n-grams, counted or not, an adaptive output layer.
    """
    odd = {
        "model.layer_sizes": len(set(model.recurrence.hidden_sizes)) > 1,
        "model.residual": model.stack("forward").residual,
        "model.layer_norm": bool(model.stack("forward").norms),
        "model.ngrams": bool(model.ngrams),
        "model.output": not isinstance(model.output, FullOutput),
    }
    if model.counted:
        raise ConfigError("counted n-grams have no form outside lmtrain; train with model.counts: null to export")
    if names := [name for name, found in odd.items() if found]:
        raise ConfigError(f"no torch.nn layer has what {', '.join(names)} asked for; --format onnx takes it")
    tensors = {"embedding.weight": model.embedding.weight}
    for direction, stack in zip(("forward", "backward"), model.recurrence.stacks, strict=False):
        for number, layer in enumerate(stack.layers):  # type: ignore[arg-type]
            for name, weight in layer.named_parameters():
                tensors[f"{direction}.{name.removesuffix('0')}{number}"] = weight
        for name, weight in model.projections[f"of_{direction}"].named_parameters():
            tensors[f"projection_{direction}.{name}"] = weight
    for name, weight in model.projections["of_fill"].named_parameters() if model.bidirectional else ():
        tensors[f"projection_fill.{name}"] = weight
    tensors |= {f"output.{name}": weight for name, weight in model.output.named_parameters()}
    return {name: weight.detach().cpu().clone() for name, weight in tensors.items()}


def write(path: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """A new folder with these files and the tokenizer, all of them or none.

    Raises:
        ConfigError: the folder is there already.
        StorageError: no room, or another fault of the file system.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new folder")
    contents = files | {"tokenizer.json": tokenizer.dumps().encode()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        beside.mkdir()
        for name, content in contents.items():
            write_synced(beside / name, content)
        beside.rename(path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        size = sum(map(len, contents.values()))
        raise StorageError(f"{path}: can't be written: {reason_of(error)}{space_note(path.parent, size)}") from None


class Steps:
    """An exported model at work, as `onnxruntime` runs it."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def begin(self, rows: int) -> dict[str, np.ndarray]:
        """States of zeros."""
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        _, *states = self.session.get_inputs()
        return {state.name: np.zeros((rows, state.shape[1]), kinds[state.type]) for state in states}

    def step(self, tokens: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read a token (B,) of each row: log-probabilities (B, V) of the next ones, and the state."""
        log_probabilities, *after = self.session.run(None, {"token": tokens, **state})
        return log_probabilities, dict(zip(state, after, strict=True))


def quantised(content: bytes, scratch: Path) -> bytes:
    """The same model with weights in 8 bits, their products in whole numbers; activations are measured as they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it advises on what does not matter here
    before, after = scratch / "fp32.onnx", scratch / "int8.onnx"
    before.write_bytes(content)
    quantize_dynamic(before, after, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    return after.read_bytes()


def log_probability(steps: Steps, ids: Sequence[int]) -> float:
    """Of ids given the first of them, token by token."""
    state, total = steps.begin(1), 0.0
    for token, following in pairwise(ids):
        found, state = steps.step(np.array([token], np.int64), state)
        total += float(found[0, following])
    return total
