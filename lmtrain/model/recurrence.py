"""Recurrent layers of one or two directions over packed rows, in PyTorch's layout.

Shapes: B rows, L longest row, I input size, H hidden size, D directions, N packed rows (the sum of the lengths).
Time comes first, (L, B, ...), as in `torch.nn.LSTM`.

Two directions are two stacks that never see each other: unlike `nn.LSTM(bidirectional=True)`, which feeds both
directions into each next layer, so that from the second layer on every output has seen every input. With one layer
the two are the same, number for number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from lmtrain.model.kernels import GRULayer, LSTMLayer, PackedRows, RNNLayer, pack_rows

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


class RecurrentStack(nn.Module):
    """`num_layers` recurrent layers in one direction; the weights live in PyTorch's own module, under its names.

    Args:
        backend: `packed`, lmtrain's kernels; `torch`, PyTorch's (cuDNN on CUDA); `auto`, packed on CPU and torch
            elsewhere.
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
        self.cell, self.backend = cell, backend
        between = dropout if num_layers > 1 else 0.0  # PyTorch warns of dropout that has no place
        self.layers = TORCH_LAYERS[cell](input_size, hidden_size, num_layers, dropout=between)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal recurrent weights for each gate, and a forget gate that starts open (bias 1).

        Orthogonal start: Saxe et al. 2014, https://arxiv.org/abs/1312.6120; forget bias: Jozefowicz et al. 2015,
        https://proceedings.mlr.press/v37/jozefowicz15.html.
        """
        self.layers.reset_parameters()
        hidden_size = self.layers.hidden_size
        for name, parameter in self.layers.named_parameters():
            if name.startswith("weight_hh"):
                for gate in parameter.split(hidden_size):
                    nn.init.orthogonal_(gate)
            elif name.startswith("bias"):
                parameter.zero_()
                if self.cell == "lstm" and name.startswith("bias_ih"):
                    parameter[hidden_size : 2 * hidden_size] = 1.0

    def zero_state(self, batch_size: int, like: Tensor) -> State:
        """Zeros on the input's device and in its dtype: h, and c for the LSTM, (num_layers, B, H)."""
        shape = (self.layers.num_layers, batch_size, self.layers.hidden_size)
        return tuple(like.new_zeros(shape) for _ in range(2 if self.cell == "lstm" else 1))

    def forward(self, inputs: Tensor, rows: PackedRows, state: State | None = None) -> tuple[Tensor, State]:
        """Packed inputs (N, I), laid out by `rows` -> packed output (N, H) and the state at each row's end."""
        if state is None:
            state = self.zero_state(rows.batch_sizes[0], inputs)
        if self.backend == "torch" or (self.backend == "auto" and inputs.device.type != "cpu"):
            packed = PackedSequence(inputs, torch.tensor(rows.batch_sizes))
            output, last = self.layers(packed, state if self.cell == "lstm" else state[0])
            return output.data, last if self.cell == "lstm" else (last,)
        return self._packed(inputs, rows, state)

    def _packed(self, inputs: Tensor, rows: PackedRows, state: State) -> tuple[Tensor, State]:
        lasts = []
        for layer in range(self.layers.num_layers):
            if layer:
                inputs = dropout(inputs, self.layers.dropout, self.training)
            weights = [
                getattr(self.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            first = [part[layer] for part in state]
            inputs, *last = KERNELS[self.cell].apply(inputs, *first, *weights, rows)  # type: ignore[no-untyped-call]
            lasts.append(last)
        return inputs, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))


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


def _lengths(batch_sizes: Tensor) -> Tensor:
    """The rows' lengths, longest first, from the number of rows that still run at each step."""
    rows = torch.arange(int(batch_sizes[0]))
    return (batch_sizes.unsqueeze(1) > rows).sum(0)
