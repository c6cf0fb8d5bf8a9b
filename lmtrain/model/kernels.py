"""lmtrain's own packed kernels for one recurrent layer in one direction: LSTM, GRU and plain RNN.

`torch.nn`'s layers accumulate the weight gradient of a ragged batch one time step at a time. Here the input
projection of all N packed rows is one matrix product, and so is each weight gradient; only the recurrence itself
goes step by step. What a step leaves for the way back (activated gates, states) stays in buffers that are
allocated once a call, and what the backward pass can compute without the step after is computed for as many steps at
once as fit the cache.

Shapes: B rows, L longest row, I input size, H hidden size, N packed rows (the sum of the lengths); gates are
PyTorch's (`torch.nn.LSTM`: i, f, g, o; `torch.nn.GRU`: r, z, n), as are the weights' layouts. Values and
gradients agree with `torch.nn` to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmtrain.model.packing import PackedRows, states_before
from lmtrain.model.products import StepWeight, product_dtype, room_for, write_product

SPAN_VALUES = 1 << 16  # of each gate in a span of steps: a quarter of a megabyte, so that a span stays in the cache


def _spans(rows: PackedRows, size_h: int) -> list[tuple[int, int]]:
    """Consecutive steps, (first, end), whose packed rows of H values stay in the cache while they are worked on."""
    spans, first, count = [], 0, 0
    for step, size in enumerate(rows.batch_sizes):
        count += size
        if count * size_h >= SPAN_VALUES or step == len(rows.batch_sizes) - 1:
            spans.append((first, step + 1))
            first, count = step + 1, 0
    return spans


def _start(initial: Tensor, rows: PackedRows) -> tuple[Tensor, Sequence[Tensor]]:
    """A state buffer (B + N, H) whose first B rows are the initial state (B, H), and the part of it of each step."""
    count = len(initial)
    buffer = initial.new_empty(count + len(rows.time), initial.shape[1])
    buffer[:count] = initial
    return buffer, buffer[count:].split(rows.batch_sizes)


def _to_read(hidden: Tensor, h_0: Tensor, dtype: torch.dtype) -> Tensor:
    """What products read in place of the hidden states (B + N, H): these, or a buffer of the dtype of products that
    holds the initial ones and is written as the others come."""
    if hidden.dtype == dtype:
        return hidden
    read = torch.empty_like(hidden, dtype=dtype)
    read[: len(h_0)] = h_0
    return read


def _room(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to write values (N, ...) for products to read: in their place, or in rows of the dtype of products, as many
    as `room_for` says."""
    if values.dtype == dtype:
        return values
    count = len(values)
    room = torch.empty(room_for(count), *values.shape[1:], dtype=dtype, device=values.device)
    room[count:] = 0
    return room


def _project(inputs: Tensor, weight_ih: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inputs (N, I) as products read them, and inputs @ weight_ih.T (N, G*H), unrounded."""
    read = _room(inputs, dtype)
    if read is not inputs:
        read[: len(inputs)] = inputs
    projected = write_product(inputs.new_empty(len(read), len(weight_ih)), read, weight_ih.t().to(dtype))
    return read, projected[: len(inputs)]


def _fewer(sizes: list[int]) -> list[int]:
    """At each step the number of rows that still run, or 0 where these are as many as before."""
    return [0, *(size if size < before else 0 for before, size in itertools.pairwise(sizes))]


def _gradients_of_states(to_output: Tensor, to_h: Tensor, rows: PackedRows) -> tuple[Tensor, list[Tensor]]:
    """What is asked of the initial state (B, H), still zero, and of the state of each step, from outside the layer."""
    to_states = to_output.contiguous().index_add(0, rows.last.to(to_h.device), to_h)  # (N, H)
    return torch.zeros_like(to_h), list(to_states.split(rows.batch_sizes))


class _Layer(torch.autograd.Function):
    """What the three cells share: the products over all N rows that end the backward pass."""

    @staticmethod
    def of_inputs(ctx: Any, inputs: Tensor, weight_ih: Tensor, to_gates: Tensor, read: Tensor) -> list[Tensor | None]:
        """Gradients of (inputs, w_ih, b_ih) from those of the gates, (N, G*H), and from what products read of these."""
        to_inputs = None
        if ctx.needs_input_grad[0]:
            room = to_gates.new_empty(len(read), weight_ih.shape[1])
            to_inputs = write_product(room, read, weight_ih.to(ctx.dtype))[: len(to_gates)]
        return [to_inputs, write_product(torch.empty_like(weight_ih), read.t(), inputs), to_gates.sum(0)]

    @staticmethod
    def of_recurrence(weight_hh: Tensor, read: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
        """Gradient of w_hh from what products read of the gates' gradients and of the hidden states."""
        rows = torch.nn.functional.pad(before, (0, len(read) - len(before)))  # any rows: theirs are zeros in `read`
        return write_product(torch.empty_like(weight_hh), read.t(), hidden.index_select(0, rows))


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
        dtype, size_h, sizes, count = product_dtype(inputs), weight_hh.shape[1], rows.batch_sizes, len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            read_inputs, gates = _project(inputs, weight_ih, dtype)
            gates.add_(bias_ih + bias_hh)
            # tanh(x) = 2 s(2x) - 1: with g's part doubled, one sigmoid over a step's whole block does for all gates
            doubled = slice(2 * size_h, 3 * size_h)
            gates[:, doubled].mul_(2)
            to_double = weight_hh.clone()
            to_double[doubled].mul_(2)
            recurrent = StepWeight(to_double.t(), dtype, count)
            (hidden, h_steps), (cell, c_steps) = _start(h_0, rows), _start(c_0, rows)  # (B + N, H)
            tanh_c = torch.empty_like(hidden[count:])
            read = _to_read(hidden, h_0, dtype)
            parts = [part.split(sizes) for part in (gates, *gates.split(size_h, 1), tanh_c, read[count:])]
            h_before, c_before = read[:count], c_0
            steps = zip(*parts, h_steps, c_steps, _fewer(sizes), strict=True)
            for gate, i, f, half_g, o, tanh, h_read, h, c, fewer in steps:
                recurrent.add_to(gate, h_before[:fewer] if fewer else h_before)
                gate.sigmoid_()
                torch.mul(f, c_before[:fewer] if fewer else c_before, out=c).addcmul_(i, half_g, value=2).sub_(i)
                torch.mul(torch.tanh(c, out=tanh), o, out=h)
                if read is not hidden:
                    h_read.copy_(h)
                h_before, c_before = h_read, c
        ctx.save_for_backward(read_inputs, weight_ih, weight_hh, gates, read, cell, tanh_c)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last], cell[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor, to_c: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, gates, hidden, cell, tanh_c = ctx.saved_tensors
        rows, size_h, sizes = ctx.rows, weight_hh.shape[1], ctx.rows.batch_sizes
        recurrent = StepWeight(weight_hh, ctx.dtype, len(to_h))
        before = states_before(rows, to_h.device)
        to_h_0, to_states = _gradients_of_states(to_output, to_h, rows)
        to_cell = to_c.clone()  # (B, H): what each row's later steps ask of its cell
        d_gates = torch.empty_like(gates)
        read = _room(d_gates, ctx.dtype)
        d_parts = [part.split(sizes) for part in (*d_gates.split(size_h, 1), d_gates, read[: len(d_gates)])]
        for first, end in reversed(_spans(rows, size_h)):
            span = slice(rows.offsets[first], rows.offsets[end - 1] + sizes[end - 1])
            i, f, half_g, o = gates[span].split(size_h, 1)  # (n, H) each
            g = half_g.mul(2).sub_(1)
            # d gate = slope * (d c for i, f, g; d h for o); d c grows by cell_slope * d h
            slope_i, slope_f, slope_g, slope_o = d_gates[span].split(size_h, 1)
            torch.ops.aten.sigmoid_backward(g, i, grad_input=slope_i)
            torch.ops.aten.sigmoid_backward(cell.index_select(0, before[span]), f, grad_input=slope_f)
            torch.ops.aten.tanh_backward(i, g, grad_input=slope_g)
            torch.ops.aten.sigmoid_backward(tanh_c[span], o, grad_input=slope_o)
            cell_slopes = torch.ops.aten.tanh_backward(o, tanh_c[span]).split(sizes[first:end])
            forgets = f.split(sizes[first:end])
            for step in reversed(range(first, end)):
                to_i, to_f, to_g, to_o, d_gate, d_read = (part[step] for part in d_parts)
                d_h, d_c, earlier = to_states[step], to_cell[: sizes[step]], to_states[step - 1] if step else to_h_0
                d_c.addcmul_(d_h, cell_slopes[step - first])
                to_i.mul_(d_c)
                to_f.mul_(d_c)
                to_g.mul_(d_c)
                to_o.mul_(d_h)
                d_c.mul_(forgets[step - first])
                if read is not d_gates:
                    d_read.copy_(d_gate)
                recurrent.add_to(earlier[: sizes[step]], d_read)
        to_inputs, to_ih, to_bias = _Layer.of_inputs(ctx, inputs, weight_ih, d_gates, read)
        to_hh = _Layer.of_recurrence(weight_hh, read, hidden, before)
        return to_inputs, to_h_0, to_cell, to_ih, to_hh, to_bias, to_bias, None


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
        dtype, size_h, sizes, count = product_dtype(inputs), weight_hh.shape[1], rows.batch_sizes, len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            read_inputs, gates = _project(inputs, weight_ih, dtype)
            gates.add_(bias_ih)
            from_hidden = bias_hh.repeat(len(inputs), 1)  # (N, 3H): W_h h + b_h, of which n is kept apart
            recurrent = StepWeight(weight_hh.t(), dtype, count)
            hidden, h_steps = _start(h_0, rows)
            read = _to_read(hidden, h_0, dtype)
            own_rz, own_n = from_hidden.split([2 * size_h, size_h], 1)
            buffers = (from_hidden, gates[:, : 2 * size_h], own_rz, *gates.split(size_h, 1), own_n, read[count:])
            parts = [buffer.split(sizes) for buffer in buffers]
            earlier, earlier_read = h_0, read[:count]
            steps = zip(*parts, h_steps, _fewer(sizes), strict=True)
            for own, gate_rz, add_rz, r, z, n, add_n, h_read, h, fewer in steps:
                recurrent.add_to(own, earlier_read[:fewer] if fewer else earlier_read)
                gate_rz.add_(add_rz).sigmoid_()
                n.addcmul_(r, add_n).tanh_()
                earlier = torch.lerp(n, earlier[:fewer] if fewer else earlier, z, out=h)
                if read is not hidden:
                    h_read.copy_(h)
                earlier_read = h_read
        ctx.save_for_backward(read_inputs, weight_ih, weight_hh, gates, own_n, hidden, read)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, gates, new_from_hidden, hidden, hidden_read = ctx.saved_tensors
        rows, size_h, sizes = ctx.rows, weight_hh.shape[1], ctx.rows.batch_sizes
        recurrent = StepWeight(weight_hh, ctx.dtype, len(to_h))
        before = states_before(rows, to_h.device)
        to_h_0, to_states = _gradients_of_states(to_output, to_h, rows)
        d_gates = torch.empty_like(gates)  # on the state's side: n's is another on the input's side
        read = _room(d_gates, ctx.dtype)
        to_new = torch.empty_like(to_output, memory_format=torch.contiguous_format)  # (N, H) of n, on the input's side
        d_parts = [part.split(sizes) for part in (*d_gates.split(size_h, 1), to_new, d_gates, read[: len(d_gates)])]
        for first, end in reversed(_spans(rows, size_h)):
            span = slice(rows.offsets[first], rows.offsets[end - 1] + sizes[end - 1])
            r, z, n = gates[span].split(size_h, 1)  # (rows, H) each
            # every gate's gradient is slope * d h
            slope_r, slope_z, slope_n = d_gates[span].split(size_h, 1)
            input_slope = torch.ops.aten.tanh_backward(1 - z, n, grad_input=to_new[span])
            torch.ops.aten.sigmoid_backward(input_slope * new_from_hidden[span], r, grad_input=slope_r)
            earlier = hidden.index_select(0, before[span])
            torch.ops.aten.sigmoid_backward(earlier.sub_(n), z, grad_input=slope_z)
            torch.mul(input_slope, r, out=slope_n)
            updates = z.split(sizes[first:end])
            for step in reversed(range(first, end)):
                to_r, to_z, to_n, to_input, d_gate, d_read = (part[step] for part in d_parts)
                d_h = to_states[step]
                to_r.mul_(d_h)
                to_z.mul_(d_h)
                to_n.mul_(d_h)
                to_input.mul_(d_h)
                if read is not d_gates:
                    d_read.copy_(d_gate)
                to_earlier = (to_states[step - 1] if step else to_h_0)[: sizes[step]]
                recurrent.add_to(to_earlier.addcmul_(d_h, updates[step - first]), d_read)
        to_hh = _Layer.of_recurrence(weight_hh, read, hidden_read, before)
        to_bias_hh = d_gates.sum(0)
        d_gates[:, 2 * size_h :] = to_new
        if read is not d_gates:
            read[: len(to_new), 2 * size_h :] = to_new
        to_inputs, to_ih, to_bias_ih = _Layer.of_inputs(ctx, inputs, weight_ih, d_gates, read)
        return to_inputs, to_h_0, to_ih, to_hh, to_bias_ih, to_bias_hh, None


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
        dtype, count = product_dtype(inputs), len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            read_inputs, projected = _project(inputs, weight_ih, dtype)
            hidden, h_steps = _start(h_0, rows)
            torch.add(projected, bias_ih + bias_hh, out=hidden[count:])
            recurrent = StepWeight(weight_hh.t(), dtype, count)
            read = _to_read(hidden, h_0, dtype)
            earlier = read[:count]
            sizes = rows.batch_sizes
            for h, h_read, fewer in zip(h_steps, read[count:].split(sizes), _fewer(sizes), strict=True):
                recurrent.add_to(h, earlier[:fewer] if fewer else earlier)
                h.tanh_()
                if read is not hidden:
                    h_read.copy_(h)
                earlier = h_read
        ctx.save_for_backward(read_inputs, weight_ih, weight_hh, hidden, read)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, hidden, hidden_read = ctx.saved_tensors
        rows = ctx.rows
        recurrent = StepWeight(weight_hh, ctx.dtype, len(to_h))
        to_h_0, to_states = _gradients_of_states(to_output, to_h, rows)
        d_gates = 1 - hidden[len(to_h) :].square()  # (N, H)
        read = _room(d_gates, ctx.dtype)
        sizes = rows.batch_sizes
        steps = zip(d_gates.split(sizes), read[: len(d_gates)].split(sizes), strict=True)
        for step, (d_gate, d_read) in reversed(list(enumerate(steps))):
            d_gate.mul_(to_states[step])
            if read is not d_gates:
                d_read.copy_(d_gate)
            earlier = to_states[step - 1] if step else to_h_0
            recurrent.add_to(earlier[: len(d_gate)], d_read)
        to_inputs, to_ih, to_bias = _Layer.of_inputs(ctx, inputs, weight_ih, d_gates, read)
        to_hh = _Layer.of_recurrence(weight_hh, read, hidden_read, states_before(rows, to_h.device))
        return to_inputs, to_h_0, to_ih, to_hh, to_bias, to_bias, None
