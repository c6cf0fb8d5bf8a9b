"""The state of a recurrent stack: what it knows of what it has read.

Shapes: B rows, H size of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = tuple[tuple[Tensor, ...], ...]
"""Of each layer h, and c for the LSTM, (B, H) each; layers may differ in size."""


def select(state: State, rows: Tensor) -> State:
    """The state of some of the rows."""
    return tuple(tuple(part.index_select(0, rows) for part in layer) for layer in state)


class CarriedState:
    """The state of each column of a text between one batch and the next, outside the graph; zeros at the beginning.

    A batch may hold the columns in any order, and fewer of them where the text ends.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self._state = columns, None

    _state: State | None

    def of(self, order: Tensor) -> State | None:
        """The state of the columns `order` (B,), in that order; None at the beginning."""
        return None if self._state is None else select(self._state, order.to(self._state[0][0].device))

    def put(self, order: Tensor, state: State) -> None:
        """Keep the state (B, H) of the columns `order`."""
        order = order.to(state[0][0].device)
        if self._state is None:
            self._state = tuple(tuple(part.new_zeros(self.columns, part.shape[1]) for part in layer) for layer in state)
        self._state = tuple(
            tuple(old.index_copy(0, order, new.detach()) for old, new in zip(kept, layer, strict=True))
            for kept, layer in zip(self._state, state, strict=True)
        )

    def clear(self) -> None:
        """Back to the beginning of the text."""
        self._state = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `LAYER/PART` -> (columns, H)."""
        return {
            f"{number}/{place}": part
            for number, layer in enumerate(self._state or ())
            for place, part in enumerate(layer)
        }

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Put back what `tensors` gave.

        Raises:
            ValueError: a name that `tensors` does not give.
        """
        layers: dict[int, dict[int, Tensor]] = {}
        for key, value in tensors.items():
            number, _, place = key.partition("/")
            layers.setdefault(int(number), {})[int(place)] = value.to(device)
        state = tuple(tuple(layers[number][place] for place in sorted(layers[number])) for number in sorted(layers))
        self._state = state or None
