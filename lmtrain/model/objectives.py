"""The predictions of a batch and their loss, and how the two directions' states and targets are aligned.

Shapes: B rows, L longest row, H hidden size, K tokens of n-gram history, M inner tokens (neither first nor last), N
packed rows or events, P output size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmtrain.model.ngrams.history import History
from lmtrain.model.output import Clusters
from lmtrain.model.packing import PackedRows, move_together, pack_rows
from lmtrain.model.states import ModelState

Direction = Literal["forward", "backward"]
Objective = Literal[Direction, "fill"]


class Events(NamedTuple):
    """The predictions of one objective in a batch: a state and a target for each of N events."""

    states: Tensor  # (N, P) inputs of the output layer
    targets: Tensor  # (N,) int64
    history: History | None = None  # for an `NgramMixture`


class Losses(NamedTuple):
    """The loss of a batch."""

    total: Tensor  # () to differentiate: weighted nats of the network and (for the gate) of the mixture, and penalties
    nats: dict[Objective, Tensor]  # () float32 each: the sum over the objective's events, outside autograd's graph
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


class Layout(NamedTuple):
    """What a model reads and predicts in a batch, worked out from its tokens on the CPU: see `lay_out`.

    The tensors are int64. `to` moves all of them but `cpu_targets` to the model's device.
    """

    rows: PackedRows  # of the steps of each stack: one fewer than a row has tokens
    targets: Tensor  # (N,), or (N + N + M,) of two directions: the targets of all objectives, one after the other
    cpu_targets: Tensor  # the same, which stay on the CPU
    inputs: Tensor  # (N,) tokens that the forward stack reads
    order: Tensor | None  # (B,) column whose state each row continues, see `CarriedState`; None: not known
    real: Tensor | None = None  # as `targets`: 1, or 0 for a target in the padding of rows; None: no row is padded
    backward_inputs: Tensor | None = None  # (N,) tokens that the backward stack reads
    fill_forward: Tensor | None = None  # (M,) as in `Alignment`, as is the next one
    fill_backward: Tensor | None = None
    tokens: Tensor | None = None  # (L, B) the batch itself, for n-grams
    flipped: Tensor | None = None  # (L, B) the same, last token first, for n-grams; -1 before a row's first token
    backward_steps: Tensor | None = None  # (N,) step in `flipped` at which the backward stack reads each packed row
    clusters: Clusters | None = None  # of the targets, for an adaptive output layer

    @property
    def sizes(self) -> list[int]:
        """How many targets each objective has."""
        events = len(self.inputs)
        return [events] if self.fill_forward is None else [events, events, len(self.fill_forward)]

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What two layouts of equally long rows share if the model launches the same kernels for both."""
        return len(self.inputs), self.rows.batch_sizes[0], self.real is None

    def clone(self) -> Layout:
        """Return the same layout with its tokens in memory of its own."""
        own: dict[str, Any] = {name: tensor.clone() for name, tensor in self.varying_tensors().items()}
        return self._replace(**own)

    def copy_(self, other: Layout) -> None:
        """Copy the tokens of a layout of the same shape into this one."""
        for name, tensor in self.varying_tensors().items():
            tensor.copy_(getattr(other, name))

    def varying_tensors(self) -> dict[str, Tensor]:
        """Return, by field, the tensors that differ between two layouts of equally long rows and of one shape."""
        named = {
            name: getattr(self, name) for name in ("inputs", "backward_inputs", "targets", "fill_backward", "real")
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> Layout:
        """Return the same layout with its tensors on a device; all of them move in one copy."""
        if self.inputs.device == device:
            return self
        plain = self._asdict()
        names = [name for name, value in plain.items() if isinstance(value, Tensor) and name != "cpu_targets"]
        clusters = [] if self.clusters is None else [self.clusters.in_head, *self.clusters.inside]
        moved = iter(move_together([*self.rows.tensors, *(plain[name] for name in names), *clusters], device))
        rows = PackedRows(self.rows.batch_sizes, self.rows.offsets, *(next(moved) for _ in self.rows.tensors))
        rest = {name: next(moved) for name in names}
        return self._replace(rows=rows, **rest, clusters=None if not clusters else Clusters(next(moved), list(moved)))


def align_padded(lengths: Tensor, steps: int) -> tuple[Alignment, Tensor, Tensor]:
    """Do what `align` does for rows that are all padded to the same number of steps.

    Every packed row is listed as an inner token, so that N and M are equal whatever the rows' own lengths.

    Returns:
        The alignment; for each packed row (N,) 1 if its row predicts a token there, 0 in the padding; and for each
        inner token (N,) likewise.
    """
    rows = pack_rows(torch.full_like(lengths, steps))
    own_steps = (lengths - 1)[rows.row]
    fill_backward = rows.at((own_steps - 2 - rows.time).clamp(min=0), rows.row)
    alignment = Alignment(rows, (own_steps - rows.time).clamp(min=1), torch.arange(len(rows.row)), fill_backward)
    return alignment, (rows.time < own_steps).long(), (rows.time < own_steps - 1).long()


def lay_out(
    tokens: Tensor,
    lengths: Tensor,
    order: Tensor | None,
    bidirectional: bool,
    with_ngrams: bool,
    padded_steps: int | None = None,
) -> Layout:
    """Lay out a batch.

    Args:
        tokens, lengths, order, padded_steps: as for `LanguageModel.lay_out`, on the CPU.
        bidirectional, with_ngrams: whether the model reads in two directions, and whether it has n-grams.
    """
    if padded_steps is None:
        alignment, real = align(lengths), None
    else:
        tokens = F.pad(tokens, (0, 0, 0, padded_steps + 1 - len(tokens)))
        alignment, real_rows, real_inner = align_padded(lengths, padded_steps)
        real = torch.cat([real_rows, real_rows, real_inner]) if bidirectional else real_rows
    rows, backward_time, fill_forward, fill_backward = alignment
    time, row = rows.time, rows.row
    targets, whole = tokens[time + 1, row], tokens if with_ngrams else None
    if not bidirectional:
        return Layout(rows, targets, targets, tokens[time, row], order, real=real, tokens=whole)
    flipped = steps = None
    if with_ngrams:
        is_token = torch.arange(len(tokens)).unsqueeze(1) < lengths
        flipped = torch.where(is_token, tokens, -1).flip(0)  # -1 + 1 is 0: nothing was read after a row's end
        steps = len(tokens) - 1 - backward_time
    targets = torch.cat([targets, tokens[backward_time - 1, row], targets[fill_forward]])
    return Layout(
        rows,
        targets,
        targets,
        tokens[time, row],
        order,
        real,
        tokens[backward_time, row],
        fill_forward,
        fill_backward,
        whole,
        flipped,
        steps,
    )


def count_events(rows: int, tokens: int) -> dict[Objective, int]:
    """Return how many tokens each objective predicts in `rows` rows of `tokens` tokens with `<bos>` and `<eos>`."""
    return {"forward": tokens - rows, "backward": tokens - rows, "fill": tokens - 2 * rows}


def weights_of_events(weights: Mapping[Objective, float | Tensor], layout: Layout) -> Tensor:
    """Return each event's weight in the loss, as `layout.targets`: its objective's, or 0 in the padding of a row.

    Args:
        weights: of each objective of the layout, a number or a tensor () on its device.
    """
    device = layout.targets.device
    parts = [
        weight.expand(size) if isinstance(weight, Tensor) else torch.full((size,), weight, device=device)
        for weight, size in zip(weights.values(), layout.sizes, strict=True)
    ]
    return torch.cat(parts) if layout.real is None else torch.cat(parts) * layout.real


def state_penalty(states: Tensor, dropped: Tensor, rows: PackedRows, activation: float, temporal: float) -> Tensor:
    """Penalise large states and states that change from step to step, from states (N, H) before and after dropout.

    The sum over packed rows of activation * mean_H(dropped**2) + temporal * mean_H((h_t - h_{t-1})**2): activation and
    temporal activation regularisation (AR and TAR), Merity et al. 2017, https://arxiv.org/abs/1708.01009.
    """
    total = activation * dropped.square().sum()
    if temporal and len(states) > rows.batch_sizes[0]:
        before = states.index_select(0, rows.previous())
        total = total + temporal * (states[rows.batch_sizes[0] :] - before).square().sum()
    return total / states.shape[1]
