"""The recurrent cells: one row of the table `CELLS` holds everything that other files ask about a cell.

To add a cell, write its kernel (in `kernels.py` or a file of its own), add its row to `CELLS`, and add its name to
`model.cell` in `config/schema.py`.

Shapes: B rows, I input size of a layer, H hidden size, G gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lmtrain.model.kernels import GRULayer, LSTMLayer, RNNLayer

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # in PyTorch's order, which all of lmtrain keeps


class OnnxGraph(Protocol):
    """The part of an ONNX graph's builder that a cell needs; `inference/export/onnx.py` has it."""

    def add(self, operator: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any: ...


class Cell(NamedTuple):
    """One kind of recurrent cell. Its functions take a layer's weights in the order `WEIGHTS`."""

    states: tuple[str, ...]  # names of the tensors (B, H) passed from token to token; the first is the layer's output
    gates: int  # G: the weights are (G*H, I) and (G*H, H), the biases (G*H,)
    kernel: Any  # lmtrain's packed kernel: `apply(inputs, *states, *weights, rows) -> output, *states`
    step: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
    """Reads one token of each row: inputs (B, I), states and weights -> the new states."""
    onnx: Callable[[OnnxGraph, str, Sequence[str], Sequence[str]], object]
    """Adds `step` to an ONNX graph, given the names of its arguments; the new state of NAME is named NAME_out."""
    start_bias: Mapping[int, float] = {}  # start value of the bias of each gate, counted from 0; 0 where left out
    torch_module: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN] | None = None  # PyTorch's, where PyTorch has the cell
    torch_function: Callable[..., tuple[Tensor, ...]] | None = None  # what `torch_module` calls; it takes any weights
    fused_on_cpu: bool = False  # whether PyTorch's float32 kernel for rows of equal length is faster than ours on CPU

    def layer(self, input_size: int, hidden_size: int) -> nn.Module:
        """A module that holds the weights of one layer; it is never called."""
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
    """The weights of a layer in the order `WEIGHTS`: (G*H, I), (G*H, H), (G*H,), (G*H,)."""
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0  # type: ignore[return-value]


def onnx_products(graph: OnnxGraph, inputs: str, hidden: str, weights: Sequence[str]) -> tuple[str, str]:
    """Add inputs @ weight_ih.T + bias_ih and the same for the hidden state; return the names of both."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    from_inputs = graph.add("Gemm", inputs, weight_ih, bias_ih, transB=1)
    return from_inputs, graph.add("Gemm", hidden, weight_hh, bias_hh, transB=1)


def _lstm_onnx(graph: OnnxGraph, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    h, c = states
    gates = graph.add("Split", graph.add("Add", *onnx_products(graph, inputs, h, weights)), outputs=4, axis=1)
    i, f, o = (graph.add("Sigmoid", gates[gate]) for gate in (0, 1, 3))
    kept = graph.add("Mul", f, c)
    new_c = graph.add("Add", kept, graph.add("Mul", i, graph.add("Tanh", gates[2])), name=f"{c}_out")
    graph.add("Mul", o, graph.add("Tanh", new_c), name=f"{h}_out")


def _gru_onnx(graph: OnnxGraph, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    (h,) = states
    products = onnx_products(graph, inputs, h, weights)
    from_inputs, from_hidden = (graph.add("Split", product, outputs=3, axis=1) for product in products)
    r, z = (graph.add("Sigmoid", graph.add("Add", from_inputs[gate], from_hidden[gate])) for gate in (0, 1))
    n = graph.add("Tanh", graph.add("Add", from_inputs[2], graph.add("Mul", r, from_hidden[2])))
    graph.add("Add", n, graph.add("Mul", z, graph.add("Sub", h, n)), name=f"{h}_out")  # (1 - z) * n + z * h


def _rnn_onnx(graph: OnnxGraph, inputs: str, states: Sequence[str], weights: Sequence[str]) -> None:
    graph.add("Tanh", graph.add("Add", *onnx_products(graph, inputs, states[0], weights)), name=f"{states[0]}_out")


# steps are PyTorch's own, as in `nn.LSTMCell`; they prepare nothing
CELLS = {
    "lstm": Cell(
        states=("h", "c"),
        gates=4,  # i, f, g, o
        kernel=LSTMLayer,
        step=lambda inputs, states, weights: torch.lstm_cell(inputs, list(states), *weights),
        onnx=_lstm_onnx,
        start_bias={1: 1.0},  # an open forget gate: Jozefowicz et al. 2015
        torch_module=nn.LSTM,
        torch_function=torch.lstm,
        fused_on_cpu=True,
    ),
    "gru": Cell(
        states=("h",),
        gates=3,  # r, z, n
        kernel=GRULayer,
        step=lambda inputs, states, weights: (torch.gru_cell(inputs, states[0], *weights),),
        onnx=_gru_onnx,
        torch_module=nn.GRU,
        torch_function=torch.gru,
    ),
    "rnn": Cell(
        states=("h",),
        gates=1,
        kernel=RNNLayer,
        step=lambda inputs, states, weights: (torch.rnn_tanh_cell(inputs, states[0], *weights),),
        onnx=_rnn_onnx,
        torch_module=nn.RNN,
        torch_function=torch.rnn_tanh,
    ),
}
