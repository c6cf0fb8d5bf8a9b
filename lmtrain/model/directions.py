"""One stack of recurrent layers, or two that read in opposite directions, with `torch.nn.LSTM`'s inputs and outputs.

Shapes: B rows, L longest row, I input size, H hidden size, D directions, N packed rows (the sum of the lengths).
Time comes first, (L, B, ...), as in `torch.nn.LSTM`.

The two stacks never see each other. `nn.LSTM(bidirectional=True)` differs: it feeds both directions into each next
layer, so that from the second layer on every output has seen every input. With one layer both give the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.recurrence import RecurrentStack
from lmtrain.model.states import StackState

TorchState = tuple[Tensor, ...]
"""A state in PyTorch's layout: h, and for the LSTM c, (num_layers*D, B, H) each."""


class RecurrentLayers(nn.Module):
    """One stack or two of recurrent layers; the arguments are those of `torch.nn.LSTM` if not listed here.

    Args:
        cell, stack_options: as in `RecurrentStack`.
        hidden_size: H of all layers, or of each from the input up. Layers of different sizes have no state in PyTorch's
            layout, so `forward` refuses them; call each of the `stacks` instead.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bidirectional: bool = False,
        **stack_options: Any,
    ) -> None:
        super().__init__()
        self.hidden_sizes = (hidden_size,) * num_layers if isinstance(hidden_size, int) else tuple(hidden_size)
        self.input_size = input_size
        self.stacks = nn.ModuleList(
            RecurrentStack(cell, input_size, self.hidden_sizes, **stack_options)
            for _ in range(2 if bidirectional else 1)
        )

    def forward(
        self, inputs: Tensor | PackedSequence, state: TorchState | None = None
    ) -> tuple[Tensor | PackedSequence, TorchState]:
        """Read inputs (L, B, I), rows of equal length, or packed (N, I), from a state (None: zeros).

        Returns:
            output: (L, B, D*H) or packed (N, D*H), the last layer's h at every step, directions side by side.
            state: h_n, and for the LSTM c_n, (num_layers*D, B, H) each: layer by layer, forward before backward, after
                the last real token of each row in reading order.

        Raises:
            ValueError: an input or state has another shape, or the layers differ in size.
        """
        if len(set(self.hidden_sizes)) > 1:
            raise ValueError(f"layers of the sizes {self.hidden_sizes} have no state of one shape; call the `stacks`")
        if isinstance(inputs, PackedSequence):
            packed, sizes = inputs.data, inputs.batch_sizes  # sizes (L,): number of rows that run at each step
            lengths = (sizes.unsqueeze(1) > torch.arange(int(sizes[0]))).sum(0)  # (B,), longest first
        else:
            if inputs.dim() != 3:
                raise ValueError(f"a padded input has 3 dimensions (L, B, I), not {inputs.dim()}")
            packed = inputs.flatten(0, 1)
            lengths = torch.full((inputs.shape[1],), inputs.shape[0])
        if packed.dim() != 2:
            raise ValueError(f"a packed input has 2 dimensions (N, I), not {packed.dim()}")
        if packed.shape[1] != self.input_size:
            raise ValueError(f"the input's last size is {packed.shape[1]}, the layer's input size {self.input_size}")
        rows = pack_rows(lengths).to(packed.device)
        output, state = self._run(packed, rows, self._split(state, len(lengths)))
        if isinstance(inputs, PackedSequence):
            return PackedSequence(output, inputs.batch_sizes, inputs.sorted_indices, inputs.unsorted_indices), state
        return output.unflatten(0, inputs.shape[:2]), state

    def _split(self, state: TorchState | None, batch_size: int) -> list[StackState | None]:
        """The state of each direction's stack, taken out of PyTorch's layout."""
        directions = len(self.stacks)
        if state is None:
            return [None] * directions
        expected = (len(self.hidden_sizes) * directions, batch_size, self.hidden_sizes[0])
        for part in state:
            if tuple(part.shape) != expected:
                raise ValueError(f"a state is (num_layers*D, B, H) = {expected}, not {tuple(part.shape)}")
        layers = list(zip(*state, strict=True))  # the (B, H) states of each layer and direction
        return [tuple(layers[direction::directions]) for direction in range(directions)]

    def _run(self, packed: Tensor, rows: PackedRows, states: list[StackState | None]) -> tuple[Tensor, TorchState]:
        output, new_state = self.stacks[0](packed, rows, states[0])
        new_states = [new_state]
        if len(self.stacks) > 1:
            from_end = rows.reversed()
            backward_output, backward_state = self.stacks[1](packed[from_end], rows, states[1])
            output = torch.cat([output, backward_output[from_end]], 1)
            new_states.append(backward_state)
        layers = [layer for pair in zip(*new_states, strict=True) for layer in pair]
        return output, tuple(torch.stack(part) for part in zip(*layers, strict=True))
