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


class _Steps:
    """The walk over the time steps: (start, size, before), `before` being where the state before a step lies in
    a buffer that holds the B initial states and then the N packed ones."""

    def __init__(self, rows: PackedRows) -> None:
        count = rows.batch_sizes[0]
        before = [0, *(count + offset for offset in rows.offsets[:-1])]
        self.all = list(zip(rows.offsets, rows.batch_sizes, before, strict=True))
        self.before = torch.tensor(before)[rows.time] + rows.row  # (N,)


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


def _start(initial: Tensor, count: int) -> Tensor:
    """A state buffer (B + N, H) whose first B rows are the initial state (B, H)."""
    buffer = initial.new_empty(len(initial) + count, initial.shape[1])
    buffer[: len(initial)] = initial
    return buffer


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
        dtype = _product_dtype(inputs)
        size_h = weight_hh.shape[1]
        steps = _Steps(rows)
        with torch.autocast(inputs.device.type, enabled=False):
            gates = _product(inputs, weight_ih.t(), dtype).add_(bias_ih + bias_hh)  # (N, 4H)
            hidden, cell = _start(h_0, len(inputs)), _start(c_0, len(inputs))  # (B + N, H)
            recurrent = weight_hh.t().to(dtype)
            count = len(h_0)
            for start, size, before in steps.all:
                gate = gates[start : start + size]
                _add_product(gate, hidden[before : before + size], recurrent, dtype)
                gate[:, : 2 * size_h].sigmoid_()
                gate[:, 2 * size_h : 3 * size_h].tanh_()
                gate[:, 3 * size_h :].sigmoid_()
                i, f, g, o = gate.view(size, 4, size_h).unbind(1)
                h, c = (buffer[count + start : count + start + size] for buffer in (hidden, cell))
                torch.mul(f, cell[before : before + size], out=c).addcmul_(i, g)
                torch.tanh(c, out=h).mul_(o)
        ctx.save_for_backward(inputs, weight_ih, weight_hh, gates, hidden, cell)
        ctx.steps, ctx.dtype, ctx.count = steps, dtype, count
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
        torch.mul(cell[ctx.steps.before] * f, 1 - f, out=slope[:, 1])
        torch.mul(i, 1 - g * g, out=slope[:, 2])
        torch.mul(tanh_c * o, 1 - o, out=slope[:, 3])
        cell_slope = o * (1 - tanh_c * tanh_c)
        d_hidden, d_cell = to_h.clone(), to_c.clone()  # (B, H): what each row's later steps ask of this one
        d_gates = slope.view(-1, 4 * size_h)
        recurrent = weight_hh.to(ctx.dtype)
        for start, size, _ in reversed(ctx.steps.all):
            part = slice(start, start + size)
            d_h, d_c = d_hidden[:size].add_(to_output[part]), d_cell[:size]
            d_c.addcmul_(d_h, cell_slope[part])
            slope[part, :3].mul_(d_c.unsqueeze(1))
            slope[part, 3].mul_(d_h)
            d_c.mul_(f[part])
            _step_back(d_h, d_gates[part], recurrent, ctx.dtype)
        to_inputs, *to_weights = _Layer.finish(
            ctx, inputs, d_gates, d_gates, hidden[ctx.steps.before], [weight_ih, weight_hh]
        )
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
        dtype = _product_dtype(inputs)
        size_h = weight_hh.shape[1]
        steps = _Steps(rows)
        with torch.autocast(inputs.device.type, enabled=False):
            gates = _product(inputs, weight_ih.t(), dtype).add_(bias_ih)  # (N, 3H)
            from_hidden = bias_hh.repeat(len(inputs), 1)  # (N, 3H): W_h h + b_h, of which n is kept apart
            hidden = _start(h_0, len(inputs))
            recurrent = weight_hh.t().to(dtype)
            count = len(h_0)
            for start, size, before in steps.all:
                gate, own = gates[start : start + size], from_hidden[start : start + size]
                earlier = hidden[before : before + size]
                _add_product(own, earlier, recurrent, dtype)
                gate[:, : 2 * size_h].add_(own[:, : 2 * size_h]).sigmoid_()
                r, z, n = gate.view(size, 3, size_h).unbind(1)
                n.addcmul_(r, own[:, 2 * size_h :]).tanh_()
                torch.lerp(n, earlier, z, out=hidden[count + start : count + start + size])
        ctx.save_for_backward(inputs, weight_ih, weight_hh, gates, from_hidden[:, 2 * size_h :], hidden)
        ctx.steps, ctx.dtype, ctx.count = steps, dtype, count
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, gates, new_from_hidden, hidden = ctx.saved_tensors
        size_h = weight_hh.shape[1]
        r, z, n = gates.view(-1, 3, size_h).unbind(1)  # (N, H) each
        before = hidden[ctx.steps.before]
        # every gate's gradient is slope * d h, the gate n's being another on the input's side than on the state's
        input_slope = (1 - z) * (1 - n * n)
        slope = torch.empty_like(gates).view(-1, 3, size_h)
        torch.mul(input_slope * new_from_hidden, r * (1 - r), out=slope[:, 0])
        torch.mul(before - n, z * (1 - z), out=slope[:, 1])
        torch.mul(input_slope, r, out=slope[:, 2])
        d_hidden = to_h.clone()  # (B, H)
        d_gates = slope.view(-1, 3 * size_h)
        recurrent = weight_hh.to(ctx.dtype)
        for start, size, _ in reversed(ctx.steps.all):
            part = slice(start, start + size)
            d_h = d_hidden[:size].add_(to_output[part])
            slope[part].mul_(d_h.unsqueeze(1))
            input_slope[part].mul_(d_h)
            kept = d_h * z[part]
            _step_back(d_h, d_gates[part], recurrent, ctx.dtype)
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
        steps = _Steps(rows)
        with torch.autocast(inputs.device.type, enabled=False):
            hidden = _start(h_0, len(inputs))
            count = len(h_0)
            hidden[count:] = _product(inputs, weight_ih.t(), dtype).add_(bias_ih + bias_hh)
            recurrent = weight_hh.t().to(dtype)
            for start, size, before in steps.all:
                h = hidden[count + start : count + start + size]
                _add_product(h, hidden[before : before + size], recurrent, dtype)
                h.tanh_()
        ctx.save_for_backward(inputs, weight_ih, weight_hh, hidden)
        ctx.steps, ctx.dtype, ctx.count = steps, dtype, count
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, hidden = ctx.saved_tensors
        d_gates = 1 - hidden[ctx.count :].square()  # (N, H)
        d_hidden = to_h.clone()
        recurrent = weight_hh.to(ctx.dtype)
        for start, size, _ in reversed(ctx.steps.all):
            part = slice(start, start + size)
            d_h = d_hidden[:size].add_(to_output[part])
            d_gates[part].mul_(d_h)
            _step_back(d_h, d_gates[part], recurrent, ctx.dtype)
        to_inputs, *to_weights = _Layer.finish(
            ctx, inputs, d_gates, d_gates, hidden[ctx.steps.before], [weight_ih, weight_hh]
        )
        return to_inputs, d_hidden, *to_weights, None


def _step_back(d_hidden: Tensor, d_gates: Tensor, recurrent: Tensor, dtype: torch.dtype) -> None:
    """d_hidden = d_gates @ recurrent, in place: the gradient that a step hands to the one before it."""
    if d_gates.dtype == dtype:
        torch.mm(d_gates, recurrent, out=d_hidden)
    else:
        d_hidden.copy_(d_gates.to(dtype) @ recurrent)
