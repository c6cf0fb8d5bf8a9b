"""The state of a model after the tokens it has read, and how it is carried from batch to batch.

Shapes: B rows, H hidden size of a layer, K tokens of n-gram history, R selected rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

StackState = tuple[tuple[Tensor, ...], ...]
"""The states of each layer of a stack, (B, H) each: h, and for the LSTM c; layers may differ in H."""


class ModelState(NamedTuple):
    """The state of a model after the tokens it has read."""

    layers: StackState
    history: Tensor | None = None  # (B, K) int64: ids + 1 of the last K tokens, 0 for none; None without n-grams


def select(state: ModelState, rows: Tensor) -> ModelState:
    """Return the state of the given rows, (R,) int64: each tensor (B, ...) -> (R, ...)."""
    layers = tuple(tuple(part.index_select(0, rows) for part in layer) for layer in state.layers)
    return ModelState(layers, None if state.history is None else state.history.index_select(0, rows))


def join(states: Sequence[ModelState]) -> ModelState:
    """Return the states of all rows of several blocks, those of the first block first."""
    if len(states) == 1:
        return states[0]
    layers = zip(*(state.layers for state in states), strict=True)
    joined = tuple(tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in layers)
    histories = [state.history for state in states if state.history is not None]
    return ModelState(joined, torch.cat(histories) if histories else None)


class CarriedState:
    """Carries the state of each column of a text from one batch to the next, outside autograd's graph.

    A batch may hold the columns in any order, and fewer of them at the text's end. For example, after a batch whose
    `order` is [2, 0], `store` keeps its first row's state for column 2 and its second row's for column 0; `of` a later
    batch's order [0, 1, 2] returns the kept state of column 0, zeros for column 1, the kept state of column 2.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._tensors: dict[str, Tensor] = {}  # by the names that `tensors` gives

    def of(self, order: Tensor) -> ModelState | None:
        """Return the state of the columns `order` (B,), in that order; None at the beginning of the text."""
        if not self._tensors:
            return None
        return select(_from_named(self._tensors), order.to(self._tensors["0/0"].device))

    def store(self, order: Tensor, state: ModelState) -> None:
        """Keep the state of B rows for the columns `order` (B,)."""
        order = order.to(state.layers[0][0].device)
        for name, new in _named(state).items():
            old = self._tensors.get(name)
            if old is None:
                old = new.new_zeros(self.columns, new.shape[1])
            self._tensors[name] = old.index_copy(0, order, new.detach())

    def clear(self) -> None:
        """Return to the beginning of the text."""
        self._tensors = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: `LAYER/PART` -> (columns, H), and `history` -> (columns, K)."""
        return dict(self._tensors)

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore what `tensors` returned; raises ValueError for a name that `tensors` does not give."""
        self._tensors = _named(_from_named({name: tensor.to(device) for name, tensor in tensors.items()}))


def _named(state: ModelState) -> dict[str, Tensor]:
    layers = enumerate(state.layers)
    named = {f"{number}/{part}": tensor for number, layer in layers for part, tensor in enumerate(layer)}
    return named if state.history is None else {**named, "history": state.history}


def _from_named(tensors: Mapping[str, Tensor]) -> ModelState:
    layers: dict[int, dict[int, Tensor]] = {}
    for name in tensors.keys() - {"history"}:
        number, _, part = name.partition("/")
        layers.setdefault(int(number), {})[int(part)] = tensors[name]
    stack = tuple(tuple(layers[number][part] for part in sorted(layers[number])) for number in sorted(layers))
    return ModelState(stack, tensors.get("history"))
