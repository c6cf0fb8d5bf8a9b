"""What a batch is asked and what that costs, and where its rows are read in both directions.

Shapes: B rows, N packed rows, M inner tokens, P output size, H tokens of history.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.states import State

Direction = Literal["forward", "backward"]
Objective = Literal[Direction, "fill"]


class Events(NamedTuple):
    """What one objective predicts in a batch, packed: a state and a target for each event."""

    states: Tensor  # (events, P)
    targets: Tensor  # (events,) int64
    history: Tensor | None = None  # (events, H) of counted n-grams: ids + 1 of the last tokens read, 0 for none


class Loss(NamedTuple):
    """Nats summed over an objective's events, and how many these are."""

    nats: Tensor  # () float32, outside the graph
    tokens: int


class Losses(NamedTuple):
    """What a batch costs."""

    total: Tensor  # () what is differentiated: the network's nats, weighted, the mixture's for its gate, penalties
    parts: dict[Objective, Loss]
    state: State  # of the forward stack at each row's end


class EncodedBatch(NamedTuple):
    """What a model makes of a batch before its output layer."""

    events: dict[Objective, Events]
    state: State  # of the forward stack at each row's end
    penalties: dict[Objective, Tensor]  # of the states of each direction, summed over its N packed rows; may be empty


class Alignment(NamedTuple):
    """Where rows of the given lengths, `<bos>` and `<eos>` counted, are read and what each place predicts.

    Both stacks read lengths - 1 tokens a row. The step of packed row k being time[k], the forward stack has read
    tokens[time] and predicts tokens[time + 1]; the backward stack, counted from the row's end, has read
    tokens[last - time] and predicts tokens[last - time - 1].
    """

    rows: PackedRows
    read_back: Tensor  # (N,) time at which the token that the backward stack reads stands
    fill_forward: Tensor  # (M,) packed row of the forward state before each inner token
    fill_backward: Tensor  # (M,) packed row of the backward state behind the same token


def align(lengths: Tensor) -> Alignment:
    """Places of the rows of a batch; lengths (B,) int64 on CPU, non-increasing, >= 2."""
    rows = pack_rows(lengths - 1)
    read_back = rows.lengths[rows.row] - rows.time
    inner = rows.time < rows.lengths[rows.row] - 1  # the last event of a row is its end, not an inner token
    time, row = rows.time[inner], rows.row[inner]
    fill_backward = rows.at(rows.lengths[row] - 2 - time, row)
    return Alignment(rows, read_back, inner.nonzero().squeeze(1), fill_backward)


def count_events(rows: int, tokens: int) -> dict[Objective, int]:
    """How many tokens each objective predicts in rows of so many tokens, `<bos>` and `<eos>` counted."""
    return {"forward": tokens - rows, "backward": tokens - rows, "fill": tokens - 2 * rows}
