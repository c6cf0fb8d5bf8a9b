"""lmtrain's own packed kernels for one recurrent layer in one direction: LSTM, GRU and plain RNN.

`torch.nn`'s layers accumulate the weight gradient of a ragged batch one time step at a time. Here the input
projection of all N packed rows is one matrix product, and so is each weight gradient; only the recurrence itself
goes step by step. What a step leaves for the way back (activated gates, states) stays in buffers that are
allocated once a call, and everything in the backward pass that does not depend on the next step is computed for
all N rows before its loop.

Shapes: B rows, L longest row, I input size, H hidden size, N packed rows (the sum of the lengths); gates are
PyTorch's (`torch.nn.LSTM`: i, f, g, o; `torch.nn.GRU`: r, z, n), as are the weights' layouts. Values and
gradients agree with `torch.nn` to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """Where the tokens of B rows lie when packed time step by time step, as in `PackedSequence`."""

    lengths: Tensor  # (B,) int64 on CPU, non-increasing, >= 1
    batch_sizes: list[int]  # (L,) rows that still run at each step
    offsets: list[int]  # (L,) where each step begins among the packed rows
    time: Tensor  # (N,) the step of each packed row
    row: Tensor  # (N,) the batch row of each packed row
    last: Tensor  # (B,) the packed row of each row's last token

    def reversed(self) -> Tensor:
        """The packed row that holds the same place of the row read from its end, (N,)."""
        return self.at(self.lengths[self.row] - 1 - self.time, self.row)

    def at(self, time: Tensor, row: Tensor) -> Tensor:
        """The packed rows of the given steps of the given rows; all index tensors on CPU."""
        return torch.tensor(self.offsets)[time] + row


def pack_rows(lengths: Tensor) -> PackedRows:
    """Lay out rows of the given lengths, (B,) int64 on CPU, longest first."""
    longest = int(lengths[0])
    steps = torch.arange(longest)
    sizes = torch.searchsorted(-lengths, -steps)  # rows with length > step, lengths being sorted
    ends = sizes.cumsum(0)
    starts = ends - sizes
    time = torch.repeat_interleave(steps, sizes)
    row = torch.arange(len(time)) - starts[time]
    last = starts[lengths - 1] + torch.arange(len(lengths))
    return PackedRows(lengths, sizes.tolist(), starts.tolist(), time, row, last)


def _before(rows: PackedRows) -> Tensor:
    """Where the state before each packed row lies in a buffer of the B initial states and the N packed ones, (N,)."""
    count = rows.batch_sizes[0]
    starts = torch.tensor([0, *(count + offset for offset in rows.offsets[:-1])])
    return starts[rows.time] + rows.row


def _product_dtype(inputs: Tensor) -> torch.dtype:
    """bf16 under autocast, else the inputs' own: only matrix products are rounded, states and sums never."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, rounded to `dtype` going in and in left's own dtype coming out."""
    if left.dtype == dtype:
        return left @ right
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """total += left @ right, `right` being in `dtype` already."""
    if left.dtype == dtype:
        total.addmm_(left, right)
    else:
        total.add_(left.to(dtype) @ right)


def _start(initial: Tensor, rows: PackedRows) -> tuple[Tensor, Sequence[Tensor]]:
    """A state buffer (B + N, H) whose first B rows are the initial state (B, H), and the part of it of each step."""
    count = len(initial)
    buffer = initial.new_empty(count + len(rows.time), initial.shape[1])
    buffer[:count] = initial
    return buffer, buffer[count:].split(rows.batch_sizes)


def _running(earlier: Tensor, part: Tensor) -> Tensor:
    """The rows of an earlier step that still run at a step: as many as the step's `part` has."""
    return earlier if len(earlier) == len(part) else earlier[: len(part)]


class _Layer(torch.autograd.Function):
    """What the three cells share: saving, and the products over all N rows that end the backward pass."""

    @staticmethod
    def finish(
        ctx: Any,
        inputs: Tensor,
        input_gates: Tensor,
        hidden_gates: Tensor,
        before: Tensor,
        weights: list[Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (inputs, w_ih, w_hh, b_ih, b_hh) from those of the gates, (N, G*H) each."""
        weight_ih = weights[0]
        to_inputs = _product(input_gates, weight_ih, ctx.dtype) if ctx.needs_input_grad[0] else None
        to_ih = _product(input_gates.t(), inputs, ctx.dtype)
        to_hh = _product(hidden_gates.t(), before, ctx.dtype)
        to_bias_ih = input_gates.sum(0)
        to_bias_hh = to_bias_ih if hidden_gates is input_gates else hidden_gates.sum(0)
        return to_inputs, to_ih, to_hh, to_bias_ih, to_bias_hh


class LSTMLayer(_Layer):
    """`apply(inputs, h_0, c_0, w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n (B, H), c_n (B, H)`.

    i = s(W_ii x + b_ii + W_hi h + b_hi), f and o alike, g = tanh(...), c' = f c + i g, h' = o tanh(c')
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        rows: PackedRows,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, size_h, sizes = _product_dtype(inputs), weight_hh.shape[1], rows.batch_sizes
        with torch.autocast(inputs.device.type, enabled=False):
            gates = _product(inputs, weight_ih.t(), dtype).add_(bias_ih + bias_hh)  # (N, 4H)
            # tanh(x) = 2 s(2x) - 1: with g's part doubled, one sigmoid over a step's whole block does for all gates
            cell_gate = gates[:, 2 * size_h : 3 * size_h]
            cell_gate.mul_(2)
            recurrent = weight_hh.t().to(dtype, copy=True)
            recurrent[:, 2 * size_h : 3 * size_h].mul_(2)
            (hidden, h_steps), (cell, c_steps) = _start(h_0, rows), _start(c_0, rows)  # (B + N, H)
            parts = [part.split(sizes) for part in (gates, *gates.split(size_h, 1))]
            h_before, c_before = h_0, c_0
            for gate, i, f, half_g, o, h, c in zip(*parts, h_steps, c_steps, strict=True):
                _add_product(gate, _running(h_before, gate), recurrent, dtype)
                gate.sigmoid_()
                torch.mul(f, _running(c_before, gate), out=c).addcmul_(i, half_g, value=2).sub_(i)
                torch.tanh(c, out=h).mul_(o)
                h_before, c_before = h, c
            cell_gate.mul_(2).sub_(1)
        count = len(h_0)
        ctx.save_for_backward(inputs, weight_ih, weight_hh, gates, hidden, cell)
        ctx.rows, ctx.dtype, ctx.count = rows, dtype, count
        return hidden[count:], hidden[count + rows.last], cell[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor, to_c: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, gates, hidden, cell = ctx.saved_tensors
        count, size_h = ctx.count, weight_hh.shape[1]
        i, f, g, o = gates.view(-1, 4, size_h).unbind(1)  # (N, H) each
        tanh_c = cell[count:].tanh()
        # d gate = slope * (d c for i, f, g; d h for o); d c grows by cell_slope * d h
        slope = torch.empty_like(gates).view(-1, 4, size_h)
        torch.mul(g * i, 1 - i, out=slope[:, 0])
        before = _before(ctx.rows)
        torch.mul(cell[before] * f, 1 - f, out=slope[:, 1])
        torch.mul(i, 1 - g * g, out=slope[:, 2])
        torch.mul(tanh_c * o, 1 - o, out=slope[:, 3])
        cell_slope = o * (1 - tanh_c * tanh_c)
        d_hidden, d_cell = to_h.clone(), to_c.clone()  # (B, H): what each row's later steps ask of this one
        d_gates = slope.view(-1, 4 * size_h)
        recurrent, sizes = weight_hh.to(ctx.dtype), ctx.rows.batch_sizes
        # a product with a broadcast takes longer than one for each gate
        parts = [part.split(sizes) for part in (to_output, cell_slope, *slope.unbind(1), f, d_gates)]
        for to_out, c_slope, slope_i, slope_f, slope_g, slope_o, forget, d_gate in reversed(
            list(zip(*parts, strict=True))
        ):
            d_h, d_c = _running(d_hidden, to_out).add_(to_out), _running(d_cell, to_out)
            d_c.addcmul_(d_h, c_slope)
            slope_i.mul_(d_c)
            slope_f.mul_(d_c)
            slope_g.mul_(d_c)
            slope_o.mul_(d_h)
            d_c.mul_(forget)
            _step_back(d_h, d_gate, recurrent, ctx.dtype)
        to_inputs, *to_weights = _Layer.finish(ctx, inputs, d_gates, d_gates, hidden[before], [weight_ih, weight_hh])
        return to_inputs, d_hidden, d_cell, *to_weights, None


class GRULayer(_Layer):
    """`apply(inputs, h_0, w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n (B, H)`.

    r = s(W_ir x + b_ir + W_hr h + b_hr), z alike, n = tanh(W_in x + b_in + r (W_hn h + b_hn)),
    h' = (1 - z) n + z h (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html).

    This is PyTorch's and cuDNN's form. Course notes often write h' = (1 - z) h + z n, with z meaning the opposite,
    and apply r before the product: n = tanh(W [r h, x]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        h_0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        rows: PackedRows,
    ) -> tuple[Tensor, Tensor]:
        dtype, size_h, sizes = _product_dtype(inputs), weight_hh.shape[1], rows.batch_sizes
        with torch.autocast(inputs.device.type, enabled=False):
            gates = _product(inputs, weight_ih.t(), dtype).add_(bias_ih)  # (N, 3H)
            from_hidden = bias_hh.repeat(len(inputs), 1)  # (N, 3H): W_h h + b_h, of which n is kept apart
            hidden, h_steps = _start(h_0, rows)
            recurrent = weight_hh.t().to(dtype)
            own_rz, own_n = from_hidden.split([2 * size_h, size_h], 1)
            buffers = (from_hidden, gates[:, : 2 * size_h], own_rz, *gates.split(size_h, 1), own_n)
            parts = [buffer.split(sizes) for buffer in buffers]
            earlier = h_0
            for own, gate_rz, add_rz, r, z, n, add_n, h in zip(*parts, h_steps, strict=True):
                earlier = _running(earlier, own)
                _add_product(own, earlier, recurrent, dtype)
                gate_rz.add_(add_rz).sigmoid_()
                n.addcmul_(r, add_n).tanh_()
                earlier = torch.lerp(n, earlier, z, out=h)
        count = len(h_0)
        ctx.save_for_backward(inputs, weight_ih, weight_hh, gates, own_n, hidden)
        ctx.rows, ctx.dtype, ctx.count = rows, dtype, count
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, gates, new_from_hidden, hidden = ctx.saved_tensors
        size_h = weight_hh.shape[1]
        r, z, n = gates.view(-1, 3, size_h).unbind(1)  # (N, H) each
        before = hidden[_before(ctx.rows)]
        # every gate's gradient is slope * d h, the gate n's being another on the input's side than on the state's
        input_slope = (1 - z) * (1 - n * n)
        slope = torch.empty_like(gates).view(-1, 3, size_h)
        torch.mul(input_slope * new_from_hidden, r * (1 - r), out=slope[:, 0])
        torch.mul(before - n, z * (1 - z), out=slope[:, 1])
        torch.mul(input_slope, r, out=slope[:, 2])
        d_hidden = to_h.clone()  # (B, H)
        d_gates = slope.view(-1, 3 * size_h)
        recurrent, sizes = weight_hh.to(ctx.dtype), ctx.rows.batch_sizes
        parts = [part.split(sizes) for part in (to_output, *slope.unbind(1), input_slope, z, d_gates)]
        for to_out, slope_r, slope_z, slope_n, in_slope, update, d_gate in reversed(list(zip(*parts, strict=True))):
            d_h = _running(d_hidden, to_out).add_(to_out)
            slope_r.mul_(d_h)
            slope_z.mul_(d_h)
            slope_n.mul_(d_h)
            in_slope.mul_(d_h)
            kept = d_h * update
            _step_back(d_h, d_gate, recurrent, ctx.dtype)
            d_h.add_(kept)
        d_input_gates = torch.cat([d_gates[:, : 2 * size_h], input_slope], 1)
        to_inputs, *to_weights = _Layer.finish(ctx, inputs, d_input_gates, d_gates, before, [weight_ih, weight_hh])
        return to_inputs, d_hidden, *to_weights, None


class RNNLayer(_Layer):
    """`apply(inputs, h_0, w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n (B, H)`.

    h' = tanh(W_i x + b_i + W_h h + b_h) (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        h_0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        rows: PackedRows,
    ) -> tuple[Tensor, Tensor]:
        dtype = _product_dtype(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            hidden, h_steps = _start(h_0, rows)
            count = len(h_0)
            hidden[count:] = _product(inputs, weight_ih.t(), dtype).add_(bias_ih + bias_hh)
            recurrent = weight_hh.t().to(dtype)
            earlier = h_0
            for h in h_steps:
                _add_product(h, _running(earlier, h), recurrent, dtype)
                earlier = h.tanh_()
        ctx.save_for_backward(inputs, weight_ih, weight_hh, hidden)
        ctx.rows, ctx.dtype, ctx.count = rows, dtype, count
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, hidden = ctx.saved_tensors
        d_gates = 1 - hidden[ctx.count :].square()  # (N, H)
        d_hidden = to_h.clone()
        recurrent, sizes = weight_hh.to(ctx.dtype), ctx.rows.batch_sizes
        for to_out, d_gate in reversed(list(zip(to_output.split(sizes), d_gates.split(sizes), strict=True))):
            d_h = _running(d_hidden, to_out).add_(to_out)
            d_gate.mul_(d_h)
            _step_back(d_h, d_gate, recurrent, ctx.dtype)
        to_inputs, *to_weights = _Layer.finish(
            ctx, inputs, d_gates, d_gates, hidden[_before(ctx.rows)], [weight_ih, weight_hh]
        )
        return to_inputs, d_hidden, *to_weights, None


def _step_back(d_hidden: Tensor, d_gates: Tensor, recurrent: Tensor, dtype: torch.dtype) -> None:
    """d_hidden = d_gates @ recurrent, in place: the gradient that a step hands to the one before it."""
    if d_gates.dtype == dtype:
        torch.mm(d_gates, recurrent, out=d_hidden)
    else:
        d_hidden.copy_(d_gates.to(dtype) @ recurrent)
