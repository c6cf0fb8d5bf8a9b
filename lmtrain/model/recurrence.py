"""A stack of recurrent layers in one direction over packed rows, and what may stand between its layers.

Shapes: B rows, I input size, H size of a layer, N packed rows (the sum of the lengths).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lmtrain.model.dropout import drop, drop_locked
from lmtrain.model.kernels import GRULayer, LSTMLayer, RNNLayer
from lmtrain.model.packing import PackedRows
from lmtrain.model.products import product_dtype
from lmtrain.model.states import State

Cell = Literal["lstm", "gru", "rnn"]
Backend = Literal["auto", "packed", "torch"]

TORCH_LAYERS: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
# what those modules call, with weights that need not be their own
TORCH_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn": torch.rnn_tanh,
}
KERNELS = {"lstm": LSTMLayer, "gru": GRULayer, "rnn": RNNLayer}
STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {  # PyTorch's, as behind `nn.LSTMCell`
    "lstm": torch.lstm_cell,
    "gru": lambda inputs, state, *weights: (torch.gru_cell(inputs, state[0], *weights),),
    "rnn": lambda inputs, state, *weights: (torch.rnn_tanh_cell(inputs, state[0], *weights),),
}


class RecurrentStack(nn.Module):
    """Recurrent layers in one direction; the weights live in PyTorch's own modules, under its names.

    Args:
        hidden_sizes: H of each layer, from the input up.
        backend: `packed`, lmtrain's kernels; `torch`, PyTorch's (cuDNN on CUDA, oneDNN's fused LSTM for rows of
            equal length on CPU); `auto`, the faster one for the device, cell, precision and lengths at hand.
        dropout: share of each layer's output that is zeroed before the next layer, in training.
        layer_dropout: the same, of features, locked over a row's steps.
        weight_dropout: share of each recurrent weight that is zeroed for a batch, in training: DropConnect, Merity et
            al. 2018, https://arxiv.org/abs/1708.02182. The kernel sees one weight as ever, and the optimizer the whole.
        layer_norm: normalise each layer's output (outside of the recurrence, which keeps its kernels): Ba et al. 2016,
            https://arxiv.org/abs/1607.06450.
        residual: add a layer's input to its output where the two are of one size: He et al. 2016,
            https://arxiv.org/abs/1512.03385.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_sizes: Sequence[int],
        dropout: float = 0.0,
        backend: Backend = "auto",
        *,
        layer_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.cell, self.backend, self.hidden_sizes = cell, backend, tuple(hidden_sizes)
        self.dropout, self.layer_dropout, self.weight_dropout = dropout, layer_dropout, weight_dropout
        self.residual = residual
        # a module for each layer: cuDNN's own dropout between layers keeps a random state that can't be saved
        sizes = zip((input_size, *self.hidden_sizes), self.hidden_sizes, strict=False)
        self.layers = nn.ModuleList(TORCH_LAYERS[cell](before, size) for before, size in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in self.hidden_sizes if layer_norm)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal recurrent weights for each gate, and a forget gate that starts open (bias 1).

        Orthogonal start: Saxe et al. 2014, https://arxiv.org/abs/1312.6120; forget bias: Jozefowicz et al. 2015,
        https://proceedings.mlr.press/v37/jozefowicz15.html.
        """
        for size, layer in zip(self.hidden_sizes, self.layers, strict=True):
            _, weight_hh, bias_ih, bias_hh = _weights(layer)
            if not weight_hh.is_meta:
                for gate in weight_hh.split(size):
                    nn.init.orthogonal_(gate)
            bias_ih.zero_()
            bias_hh.zero_()
            if self.cell == "lstm":
                bias_ih[size : 2 * size] = 1.0

    def zero_state(self, batch_size: int, like: Tensor) -> State:
        """Zeros on the input's device and in its dtype: of each layer h, and c for the LSTM, (B, H)."""
        parts = 2 if self.cell == "lstm" else 1
        return tuple(tuple(like.new_zeros(batch_size, size) for _ in range(parts)) for size in self.hidden_sizes)

    def forward(self, inputs: Tensor, rows: PackedRows, state: State | None = None) -> tuple[Tensor, State]:
        """Packed inputs (N, I), laid out by `rows` -> packed output (N, H) and the state at each row's end."""
        if state is None:
            state = self.zero_state(rows.batch_sizes[0], inputs)
        stock = self.backend == "torch" or (self.backend == "auto" and self._torch_is_faster(inputs, rows))
        run = self._torch if stock else self._packed
        lasts = []
        for number, layer in enumerate(self.layers):
            before = inputs
            if number:
                inputs = drop(inputs, self.dropout, self.training)
                inputs = drop_locked(inputs, rows, self.layer_dropout, self.training)
            weight_ih, weight_hh, *biases = _weights(layer)
            weights = (weight_ih, drop(weight_hh, self.weight_dropout, self.training), *biases)
            output, *last = run(inputs, rows, state[number], weights)
            inputs = self._above(number, before, output)
            lasts.append(tuple(last))
        return inputs, tuple(lasts)

    def step(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token of each row: inputs (B, I) -> output (B, H) and the state after it.

        Whatever the backend, by PyTorch's cells, which prepare nothing; without dropout, as it is not for training.
        """
        if state is None:
            state = self.zero_state(len(inputs), inputs)
        lasts = []
        for number, layer in enumerate(self.layers):
            last = STEPS[self.cell](inputs, list(state[number]), *_weights(layer))
            inputs = self._above(number, inputs, last[0])
            lasts.append(tuple(last))
        return inputs, tuple(lasts)

    def _above(self, number: int, inputs: Tensor, output: Tensor) -> Tensor:
        """What the next layer, or the model, reads of a layer."""
        if self.norms:
            output = self.norms[number](output)
        return output + inputs if self.residual and inputs.shape == output.shape else output

    def _packed(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = KERNELS[self.cell].apply(inputs, *state, *weights, rows)  # type: ignore[no-untyped-call]
        return result

    def _torch_is_faster(self, inputs: Tensor, rows: PackedRows) -> bool:
        fused = self.cell == "lstm" and rows.equal and product_dtype(inputs) == torch.float32
        return inputs.device.type != "cpu" or fused

    def _torch(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        first = [part.unsqueeze(0) for part in state]
        initial = tuple(first) if self.cell == "lstm" else first[0]
        # biases, one layer, no dropout of its own, one direction
        how = (list(weights), True, 1, 0.0, self.training, False)
        if rows.equal:
            columns = inputs.unflatten(0, (-1, rows.batch_sizes[0]))
            output, *last = TORCH_FUNCTIONS[self.cell](columns, initial, *how, False)  # time comes first
            output = output.flatten(0, 1)
        else:
            output, *last = TORCH_FUNCTIONS[self.cell](inputs, torch.tensor(rows.batch_sizes), initial, *how)
        return output, *(part.squeeze(0) for part in last)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0  # type: ignore[return-value]
