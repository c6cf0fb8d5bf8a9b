"""One stack of recurrent layers, or two that read in opposite directions, with `torch.nn.LSTM`'s inputs and outputs.

Shapes: B rows, L longest row, I input size, H hidden size, D directions, N packed rows (the sum of the lengths).
Time comes first, (L, B, ...), as in `torch.nn.LSTM`.

Two directions are two stacks that never see each other: unlike `nn.LSTM(bidirectional=True)`, which feeds both
directions into each next layer, so that from the second layer on every output has seen every input. With one layer
the two are the same, number for number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.recurrence import Backend, Cell, RecurrentStack
from lmtrain.model.states import State

StackedState = tuple[Tensor, ...]
"""h, and c for the LSTM: (num_layers*D, B, H)."""


class RecurrentLayers(nn.Module):
    """One stack, or two that read in opposite directions and do not mix, with `torch.nn.LSTM`'s inputs and outputs.

    Args: as `torch.nn.LSTM`; `cell`, `backend` and more keywords as `RecurrentStack`.
        hidden_size: of all layers, or of each, from the input up; layers that differ have no state in PyTorch's layout,
            so their stacks are used by themselves.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        backend: Backend = "auto",
        **more: Any,
    ) -> None:
        super().__init__()
        self.hidden_sizes = (hidden_size,) * num_layers if isinstance(hidden_size, int) else tuple(hidden_size)
        self.input_size = input_size
        self.stacks = nn.ModuleList(
            RecurrentStack(cell, input_size, self.hidden_sizes, dropout, backend, **more)
            for _ in range(2 if bidirectional else 1)
        )

    def forward(
        self, inputs: Tensor | PackedSequence, state: StackedState | None = None
    ) -> tuple[Tensor | PackedSequence, StackedState]:
        """Padded (L, B, I), rows of equal length, or packed (N, I) -> output of the same kind, and the last state.

        Returns:
            output (L, B, D*H) or packed (N, D*H): the last layer's state at every step, directions side by side.
            state: h_n, and c_n for the LSTM, (num_layers*D, B, H): layer by layer, forward before backward, each at
                its own row's last real token in reading order.

        Raises:
            ValueError: an input or state of another shape, or layers that differ in size.
        """
        if len(set(self.hidden_sizes)) > 1:
            raise ValueError(f"layers of the sizes {self.hidden_sizes} have no state of one shape")
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

    def _split(self, state: StackedState | None, batch_size: int) -> list[State | None]:
        """The state of each direction's stack, out of PyTorch's interleaved layout."""
        directions = len(self.stacks)
        if state is None:
            return [None] * directions
        expected = (len(self.hidden_sizes) * directions, batch_size, self.hidden_sizes[0])
        for part in state:
            if tuple(part.shape) != expected:
                raise ValueError(f"a state is (num_layers*D, B, H) = {expected}, not {tuple(part.shape)}")
        layers = list(zip(*state, strict=True))  # (B, H) of each part, layer by layer and direction by direction
        return [tuple(layers[direction::directions]) for direction in range(directions)]

    def _run(self, packed: Tensor, rows: PackedRows, states: list[State | None]) -> tuple[Tensor, StackedState]:
        output, last = self.stacks[0](packed, rows, states[0])
        ends = [last]
        if len(self.stacks) > 1:
            back = rows.reversed().to(packed.device)
            backward_output, backward_last = self.stacks[1](packed[back], rows, states[1])
            output = torch.cat([output, backward_output[back]], 1)
            ends.append(backward_last)
        layers = [layer for pair in zip(*ends, strict=True) for layer in pair]
        return output, tuple(torch.stack(part) for part in zip(*layers, strict=True))


def _lengths(batch_sizes: Tensor) -> Tensor:
    """The rows' lengths, longest first, from the number of rows that still run at each step."""
    rows = torch.arange(int(batch_sizes[0]))
    return (batch_sizes.unsqueeze(1) > rows).sum(0)
