"""The recurrent cells: one row of the table `CELLS` holds everything that other files ask about a cell.

To add a cell, write its kernel, add its row to `CELLS`, and add its name to `model.cell` in `config/schema.py`.

Shapes: B rows, I input size of a layer, H hidden size, G gates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmtrain.model.kernels import GRULayer, LSTMLayer, RNNLayer

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # in PyTorch's order, which all of lmtrain keeps

Step = Callable[..., tuple[Tensor, ...]]


class Cell(NamedTuple):
    """One kind of recurrent cell. Its functions take a layer's weights in the order `WEIGHTS`."""

    states: tuple[str, ...]  # names of the (B, H) tensors passed from token to token; the first is the output
    gates: int  # G: the weights are (G*H, I) and (G*H, H), the biases (G*H,)
    kernel: Any  # lmtrain's packed kernel: `apply(inputs, *states, *weights, rows) -> output, *states`
    step: Step  # reads one token of each row: `step(inputs (B, I), states, *weights) -> states`
    onnx: Callable[[Any, str, Sequence[str], Sequence[str]], object]
    """Adds `step` to the graph of `inference/export/onnx.py`, given the names of inputs, states and weights; the new
    state of NAME gets the name NAME_out."""
    start_bias: Mapping[int, float] = {}  # start value of the bias of each gate, counted from 0; 0 if left out
    torch_module: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN] | None = None  # PyTorch's, if PyTorch has the cell
    torch_function: Step | None = None  # called by `torch_module`; takes any weights
    fused_on_cpu: bool = False  # whether PyTorch's float32 kernel for rows of equal length is faster than ours on CPU

    def layer(self, input_size: int, hidden_size: int) -> nn.Module:
        """Return a module that holds the weights of one layer; it is never called."""
        if self.torch_module is not None:
            return self.torch_module(input_size, hidden_size)
        return CellWeights(input_size, hidden_size, self.gates)


class CellWeights(nn.Module):
    """The weights of a layer whose cell PyTorch lacks, with the names and start values of PyTorch's modules."""

    def __init__(self, input_size: int, hidden_size: int, gates: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        rows = gates * hidden_size
        bound = 1 / math.sqrt(hidden_size)
        for name, shape in zip(WEIGHTS, [(rows, input_size), (rows, hidden_size), (rows,), (rows,)], strict=True):
            self.register_parameter(f"{name}_l0", nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound)))


def layer_weights(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of a layer in the order `WEIGHTS`: (G*H, I), (G*H, H), (G*H,), (G*H,)."""
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0  # type: ignore[return-value]


def _one_state_step(
    function: Callable[..., Tensor], inputs: Tensor, states: Sequence[Tensor], *weights: Tensor
) -> tuple[Tensor]:
    """The step of a cell with one state, by a function that returns the new state."""
    return (function(inputs, *states, *weights),)


def onnx_products(graph: Any, inputs: str, hidden: str, weights: Sequence[str]) -> tuple[str, str]:
    """Add inputs @ weight_ih.T + bias_ih and hidden @ weight_hh.T + bias_hh; return the names of both results."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    from_inputs = graph.add("Gemm", inputs, weight_ih, bias_ih, transB=1)
    return from_inputs, graph.add("Gemm", hidden, weight_hh, bias_hh, transB=1)


def _lstm_onnx(graph: Any, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    h, c = states
    gates = graph.add("Split", graph.add("Add", *onnx_products(graph, inputs, h, weights)), outputs=4, axis=1)
    i, f, o = (graph.add("Sigmoid", gates[gate]) for gate in (0, 1, 3))
    kept = graph.add("Mul", f, c)
    new_c = graph.add("Add", kept, graph.add("Mul", i, graph.add("Tanh", gates[2])), name=f"{c}_out")
    graph.add("Mul", o, graph.add("Tanh", new_c), name=f"{h}_out")


def _gru_onnx(graph: Any, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    (h,) = states
    products = onnx_products(graph, inputs, h, weights)
    from_inputs, from_hidden = (graph.add("Split", product, outputs=3, axis=1) for product in products)
    r, z = (graph.add("Sigmoid", graph.add("Add", from_inputs[gate], from_hidden[gate])) for gate in (0, 1))
    n = graph.add("Tanh", graph.add("Add", from_inputs[2], graph.add("Mul", r, from_hidden[2])))
    graph.add("Add", n, graph.add("Mul", z, graph.add("Sub", h, n)), name=f"{h}_out")  # (1 - z) * n + z * h


def _rnn_onnx(graph: Any, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    graph.add("Tanh", graph.add("Add", *onnx_products(graph, inputs, states[0], weights)), name=f"{states[0]}_out")


# each step is PyTorch's own function, which takes the weights as they are; the LSTM's forget gate (1) starts open
CELLS = {
    "lstm": Cell(
        ("h", "c"), 4, LSTMLayer, torch.lstm_cell, _lstm_onnx, {1: 1.0}, nn.LSTM, torch.lstm, fused_on_cpu=True
    ),
    "gru": Cell(("h",), 3, GRULayer, partial(_one_state_step, torch.gru_cell), _gru_onnx, {}, nn.GRU, torch.gru),
    "rnn": Cell(
        ("h",), 1, RNNLayer, partial(_one_state_step, torch.rnn_tanh_cell), _rnn_onnx, {}, nn.RNN, torch.rnn_tanh
    ),
}
