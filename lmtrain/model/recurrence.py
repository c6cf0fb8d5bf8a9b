"""Recurrent layers of one or two directions over packed rows, in PyTorch's layout.

Shapes: B rows, L longest row, I input size, H hidden size, D directions, N packed rows (the sum of the lengths).
Time comes first, (L, B, ...), as in `torch.nn.LSTM`.

Two directions are two stacks that never see each other: unlike `nn.LSTM(bidirectional=True)`, which feeds both
directions into each next layer, so that from the second layer on every output has seen every input. With one layer
the two are the same, number for number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lmtrain.model.dropout import drop
from lmtrain.model.kernels import GRULayer, LSTMLayer, RNNLayer
from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.products import product_dtype

Cell = Literal["lstm", "gru", "rnn"]
Backend = Literal["auto", "packed", "torch"]

State = tuple[Tensor, ...]
"""h, and c for the LSTM: (num_layers, B, H) for a stack, (num_layers*D, B, H) for layers of D directions."""

TORCH_LAYERS: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
KERNELS = {"lstm": LSTMLayer, "gru": GRULayer, "rnn": RNNLayer}
STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {  # PyTorch's, as behind `nn.LSTMCell`
    "lstm": torch.lstm_cell,
    "gru": lambda inputs, state, *weights: (torch.gru_cell(inputs, state[0], *weights),),
    "rnn": lambda inputs, state, *weights: (torch.rnn_tanh_cell(inputs, state[0], *weights),),
}


class RecurrentStack(nn.Module):
    """`num_layers` recurrent layers in one direction; the weights live in PyTorch's own module, under its names.

    Args:
        backend: `packed`, lmtrain's kernels; `torch`, PyTorch's (cuDNN on CUDA, oneDNN's fused LSTM for rows of
            equal length on CPU); `auto`, the faster one for the device, cell, precision and lengths at hand.
        dropout: share of each layer's output that is zeroed before the next layer, in training.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.cell, self.backend, self.dropout, self.hidden_size = cell, backend, dropout, hidden_size
        # a module for each layer: cuDNN's own dropout between layers keeps a random state that can't be saved
        self.layers = nn.ModuleList(
            TORCH_LAYERS[cell](hidden_size if layer else input_size, hidden_size) for layer in range(num_layers)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal recurrent weights for each gate, and a forget gate that starts open (bias 1).

        Orthogonal start: Saxe et al. 2014, https://arxiv.org/abs/1312.6120; forget bias: Jozefowicz et al. 2015,
        https://proceedings.mlr.press/v37/jozefowicz15.html.
        """
        for name, parameter in self.named_parameters():
            kind = name.split(".")[-1]
            if kind.startswith("weight_hh") and not parameter.is_meta:
                for gate in parameter.split(self.hidden_size):
                    nn.init.orthogonal_(gate)
            elif kind.startswith("bias"):
                parameter.zero_()
                if self.cell == "lstm" and kind.startswith("bias_ih"):
                    parameter[self.hidden_size : 2 * self.hidden_size] = 1.0

    def zero_state(self, batch_size: int, like: Tensor) -> State:
        """Zeros on the input's device and in its dtype: h, and c for the LSTM, (num_layers, B, H)."""
        shape = (len(self.layers), batch_size, self.hidden_size)
        return tuple(like.new_zeros(shape) for _ in range(2 if self.cell == "lstm" else 1))

    def forward(self, inputs: Tensor, rows: PackedRows, state: State | None = None) -> tuple[Tensor, State]:
        """Packed inputs (N, I), laid out by `rows` -> packed output (N, H) and the state at each row's end."""
        if state is None:
            state = self.zero_state(rows.batch_sizes[0], inputs)
        stock = self.backend == "torch" or (self.backend == "auto" and self._torch_is_faster(inputs, rows))
        run = self._torch if stock else self._packed
        lasts = []
        for number, layer in enumerate(self.layers):
            if number:
                inputs = drop(inputs, self.dropout, self.training)
            inputs, *last = run(layer, inputs, rows, [part[number] for part in state])
            lasts.append(last)
        return inputs, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def step(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One token of each row: inputs (B, I) -> output (B, H) and the state after it.

        Whatever the backend, by PyTorch's cells, which prepare nothing; without dropout, as it is not for training.
        """
        if state is None:
            state = self.zero_state(len(inputs), inputs)
        lasts = []
        for number, layer in enumerate(self.layers):
            last = STEPS[self.cell](inputs, [part[number] for part in state], *_weights(layer))
            lasts.append(last)
            inputs = last[0]
        return inputs, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _packed(self, layer: nn.Module, inputs: Tensor, rows: PackedRows, state: list[Tensor]) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = KERNELS[self.cell].apply(inputs, *state, *_weights(layer), rows)  # type: ignore[no-untyped-call]
        return result

    def _torch_is_faster(self, inputs: Tensor, rows: PackedRows) -> bool:
        fused = self.cell == "lstm" and rows.equal and product_dtype(inputs) == torch.float32
        return inputs.device.type != "cpu" or fused

    def _torch(self, layer: nn.Module, inputs: Tensor, rows: PackedRows, state: list[Tensor]) -> tuple[Tensor, ...]:
        first = [part.unsqueeze(0) for part in state]
        initial = tuple(first) if self.cell == "lstm" else first[0]
        if rows.equal:
            padded, last = layer(inputs.unflatten(0, (-1, rows.batch_sizes[0])), initial)
            output = padded.flatten(0, 1)
        else:
            packed, last = layer(PackedSequence(inputs, torch.tensor(rows.batch_sizes)), initial)
            output = packed.data
        return output, *(part.squeeze(0) for part in (last if self.cell == "lstm" else (last,)))


class RecurrentLayers(nn.Module):
    """One stack, or two that read in opposite directions and do not mix, with `torch.nn.LSTM`'s inputs and outputs.

    Args: as `torch.nn.LSTM`; `cell` and `backend` as `RecurrentStack`.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.stacks = nn.ModuleList(
            RecurrentStack(cell, input_size, hidden_size, num_layers, dropout, backend)
            for _ in range(2 if bidirectional else 1)
        )

    def forward(
        self, inputs: Tensor | PackedSequence, state: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Padded (L, B, I), rows of equal length, or packed (N, I) -> output of the same kind, and the last state.

        Returns:
            output (L, B, D*H) or packed (N, D*H): the last layer's state at every step, directions side by side.
            state: h_n, and c_n for the LSTM, (num_layers*D, B, H): layer by layer, forward before backward, each at
                its own row's last real token in reading order.

        Raises:
            ValueError: an input or state of another shape.
        """
        if isinstance(inputs, PackedSequence):
            packed, lengths = inputs.data, _lengths(inputs.batch_sizes)
        else:
            if inputs.dim() != 3:
                raise ValueError(f"a padded input has 3 dimensions (L, B, I), not {inputs.dim()}")
            packed = inputs.flatten(0, 1)
            lengths = torch.full((inputs.shape[1],), inputs.shape[0])
        if packed.dim() != 2:
            raise ValueError(f"a packed input has 2 dimensions (N, I), not {packed.dim()}")
        if packed.shape[1] != self.input_size:
            raise ValueError(f"the input's last size is {packed.shape[1]}, the layer's input size {self.input_size}")
        rows = pack_rows(lengths)
        output, state = self._run(packed, rows, self._split(state, len(lengths)))
        if isinstance(inputs, PackedSequence):
            return PackedSequence(output, inputs.batch_sizes, inputs.sorted_indices, inputs.unsorted_indices), state
        return output.unflatten(0, inputs.shape[:2]), state

    def _split(self, state: State | None, batch_size: int) -> list[State | None]:
        """The state of each direction's stack, out of PyTorch's interleaved layout."""
        directions = len(self.stacks)
        if state is None:
            return [None] * directions
        expected = (self.num_layers * directions, batch_size, self.hidden_size)
        for part in state:
            if tuple(part.shape) != expected:
                raise ValueError(f"a state is (num_layers*D, B, H) = {expected}, not {tuple(part.shape)}")
        return [tuple(part[direction::directions] for part in state) for direction in range(directions)]

    def _run(self, packed: Tensor, rows: PackedRows, states: list[State | None]) -> tuple[Tensor, State]:
        output, last = self.stacks[0](packed, rows, states[0])
        if len(self.stacks) == 1:
            return output, last
        back = rows.reversed().to(packed.device)
        backward_output, backward_last = self.stacks[1](packed[back], rows, states[1])
        interleaved = tuple(torch.stack(pair, 1).flatten(0, 1) for pair in zip(last, backward_last, strict=True))
        return torch.cat([output, backward_output[back]], 1), interleaved


def _weights(layer: nn.Module) -> tuple[Tensor, ...]:
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0  # type: ignore[return-value]


def _lengths(batch_sizes: Tensor) -> Tensor:
    """The rows' lengths, longest first, from the number of rows that still run at each step."""
    rows = torch.arange(int(batch_sizes[0]))
    return (batch_sizes.unsqueeze(1) > rows).sum(0)
