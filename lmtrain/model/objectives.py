"""The predictions of a batch and their loss, and how the two directions' states and targets are aligned.

Shapes: B rows, L longest row, H hidden size, K tokens of n-gram history, M inner tokens (neither first nor last), N
packed rows or events, P output size.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.states import ModelState

Direction = Literal["forward", "backward"]
Objective = Literal[Direction, "fill"]


class Events(NamedTuple):
    """The predictions of one objective in a batch: a state and a target for each of N events."""

    states: Tensor  # (N, P) inputs of the output layer
    targets: Tensor  # (N,) int64
    history: Tensor | None = None  # (N, K) for counted n-grams: ids + 1 of the last tokens read, 0 for none


class Losses(NamedTuple):
    """The loss of a batch."""

    total: Tensor  # () to differentiate: weighted nats of the network and (for the gate) of the mixture, and penalties
    nats: dict[Objective, Tensor]  # () float32 each: the sum over the objective's events, outside the graph
    state: ModelState  # state of the forward stack at each row's end


class EncodedBatch(NamedTuple):
    """A batch after the recurrent stacks and before the output layer."""

    events: dict[Objective, Events]
    state: ModelState  # state of the forward stack at each row's end
    penalties: dict[Objective, Tensor]  # () `state_penalty` of each direction; empty if there are no penalties


class Alignment(NamedTuple):
    """Which tokens the two stacks read and predict in padded tokens (L, B), each row from its `<bos>` to its `<eos>`.

    Each stack reads all tokens of a row but one: in `<bos> a b <eos>` the forward stack reads <bos>, a, b and predicts
    the token after each; the backward stack reads <eos>, b, a and predicts the token before each. The inner token a is
    filled in from the forward state after <bos> and the backward state after b.
    """

    rows: PackedRows  # a row of n tokens has n - 1 steps; at step t the forward stack reads token t
    backward_time: Tensor  # (N,) the token that the backward stack reads at each packed row: n - 1 - t
    fill_forward: Tensor  # (M,) packed row of the forward state before each inner token
    fill_backward: Tensor  # (M,) packed row of the backward state after the same token


def align(lengths: Tensor) -> Alignment:
    """Align both directions; lengths (B,) int64 on CPU, non-increasing, >= 2, with `<bos>` and `<eos>`."""
    rows = pack_rows(lengths - 1)
    backward_time = rows.lengths[rows.row] - rows.time
    inner = rows.time < rows.lengths[rows.row] - 1  # the last event of a row is its end, not an inner token
    time, row = rows.time[inner], rows.row[inner]
    fill_backward = rows.at(rows.lengths[row] - 2 - time, row)
    return Alignment(rows, backward_time, inner.nonzero().squeeze(1), fill_backward)


def count_events(rows: int, tokens: int) -> dict[Objective, int]:
    """Return how many tokens each objective predicts in `rows` rows of `tokens` tokens with `<bos>` and `<eos>`."""
    return {"forward": tokens - rows, "backward": tokens - rows, "fill": tokens - 2 * rows}


def state_penalty(states: Tensor, dropped: Tensor, rows: PackedRows, activation: float, temporal: float) -> Tensor:
    """Penalise large states and states that change from step to step, from states (N, H) before and after dropout.

    The sum over packed rows of activation * mean_H(dropped**2) + temporal * mean_H((h_t - h_{t-1})**2): activation and
    temporal activation regularisation (AR and TAR), Merity et al. 2017, https://arxiv.org/abs/1708.01009.
    """
    total = activation * dropped.square().sum()
    if temporal and len(states) > rows.batch_sizes[0]:
        before = states.index_select(0, rows.previous().to(states.device))
        total = total + temporal * (states[rows.batch_sizes[0] :] - before).square().sum()
    return total / states.shape[1]
