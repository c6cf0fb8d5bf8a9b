"""lmtrain's own packed kernels for one recurrent layer in one direction: LSTM, GRU and plain RNN.

`torch.nn`'s layers add up the weight gradient of a ragged batch one time step at a time. Here the input projection of
all N packed rows is one matrix product, and so is each weight gradient; only the recurrence itself runs step by step.
The forward pass keeps what the backward pass needs (activated gates, states) in buffers that are allocated once a call.
The backward pass computes what does not depend on later steps for as many steps at once as fit into the cache.

Shapes: B rows, G gates, H hidden size, I input size of a layer, L longest row, N packed rows (the sum of the lengths),
R packed rows of a span of steps.
The gates' order (LSTM: i, f, g, o; GRU: r, z, n) and the weights' layouts are PyTorch's. Values and gradients agree
with `torch.nn` up to rounding.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmtrain.model.packing import PackedRows, states_before
from lmtrain.model.products import StepWeight, padded_rows, product_dtype, write_product

SPAN_VALUES = 1 << 16  # values of each gate in a span of steps: a quarter of a megabyte, so that a span stays in cache

# (gradient, output) -> gradient before the activation; PyTorch has no public form that writes to a buffer (grad_input)
sigmoid_backward = torch.ops.aten.sigmoid_backward
tanh_backward = torch.ops.aten.tanh_backward


def spans_of(rows: PackedRows, hidden_size: int) -> list[tuple[int, int]]:
    """Return spans of steps, (first, end), whose packed rows of H values stay in the cache while they are worked on."""
    spans, first, count = [], 0, 0
    for step, size in enumerate(rows.batch_sizes):
        count += size
        if count * hidden_size >= SPAN_VALUES or step == len(rows.batch_sizes) - 1:
            spans.append((first, step + 1))
            first, count = step + 1, 0
    return spans


def state_buffer(initial: Tensor, rows: PackedRows) -> tuple[Tensor, Sequence[Tensor]]:
    """Return a buffer (B + N, H) whose first B rows are the initial state (B, H), and the part of it for each step."""
    count = len(initial)
    buffer = initial.new_empty(count + len(rows.time), initial.shape[1])
    buffer[:count] = initial
    return buffer, buffer[count:].split(rows.batch_sizes)


def operand_of_states(hidden: Tensor, h_0: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand (B + N, H) for the hidden states in products: `hidden` itself if it has the products' dtype, else a
    new buffer that begins with h_0 (B, H), to which the caller copies each step's state."""
    if hidden.dtype == dtype:
        return hidden
    operand = torch.empty_like(hidden, dtype=dtype)
    operand[: len(h_0)] = h_0
    return operand


def operand_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand for values (N, ...) in products: `values` itself if it has the products' dtype, else a new buffer of
    `padded_rows(N)` rows, to whose first N rows the caller copies the values."""
    if values.dtype == dtype:
        return values
    count = len(values)
    operand = torch.empty(padded_rows(count), *values.shape[1:], dtype=dtype, device=values.device)
    operand[count:] = 0
    return operand


def project(inputs: Tensor, w_ih: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the operand of the inputs (N, I), and inputs @ w_ih.T (N, G*H) in the inputs' dtype; w_ih is (G*H, I)."""
    operand = operand_of(inputs, dtype)
    if operand is not inputs:
        operand[: len(inputs)] = inputs
    projected = write_product(inputs.new_empty(len(operand), len(w_ih)), operand, w_ih.t().to(dtype))
    return operand, projected[: len(inputs)]


def fewer_rows(sizes: list[int]) -> list[int]:
    """Return for each step (L,) the number of rows that still run, or 0 if it is the same as at the step before."""
    return [0, *(size if size < before else 0 for before, size in itertools.pairwise(sizes))]


def state_gradients(to_output: Tensor, to_h: Tensor, rows: PackedRows) -> tuple[Tensor, list[Tensor]]:
    """Buffers for the gradients of the initial state (B, H) and of each step's state. The first begins as zeros,
    the others as the gradients of the kernel's outputs: `to_output` (N, H), and `to_h` (B, H) at each row's end."""
    to_states = to_output.contiguous().index_add(0, rows.last, to_h)  # (N, H)
    return torch.zeros_like(to_h), list(to_states.split(rows.batch_sizes))


def input_gradients(ctx: Any, inputs: Tensor, w_ih: Tensor, d_gates: Tensor, operand: Tensor) -> list[Tensor | None]:
    """Return the gradients of (inputs, w_ih, b_ih) from those of the gates, `d_gates` (N, G*H), and their operand."""
    to_inputs = None
    if ctx.needs_input_grad[0]:
        buffer = d_gates.new_empty(len(operand), w_ih.shape[1])
        to_inputs = write_product(buffer, operand, w_ih.to(ctx.dtype))[: len(d_gates)]
    return [to_inputs, write_product(torch.empty_like(w_ih), operand.t(), inputs), d_gates.sum(0)]


def recurrence_gradient(w_hh: Tensor, operand: Tensor, hidden: Tensor, before: Tensor) -> Tensor:
    """Gradient of w_hh (G*H, H) from the operands of the gates' gradients and hidden states; see `states_before`."""
    rows = torch.nn.functional.pad(before, (0, len(operand) - len(before)))  # padding: these rows of `operand` are 0
    return write_product(torch.empty_like(w_hh), operand.t(), hidden.index_select(0, rows))


class LSTMLayer(torch.autograd.Function):
    """`apply(inputs (N, I), h_0, c_0, w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n, c_n`; states are (B, H).

    i = s(W_ii x + b_ii + W_hi h + b_hi), f and o in the same way, g = tanh(...), c' = f c + i g, h' = o tanh(c')
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        rows: PackedRows,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, hidden_size, sizes, count = product_dtype(inputs), w_hh.shape[1], rows.batch_sizes, len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            input_operand, gates = project(inputs, w_ih, dtype)
            gates.add_(b_ih + b_hh)
            # tanh(x) = 2 s(2x) - 1: with g's part doubled, one sigmoid over all gates of a step is enough
            doubled = slice(2 * hidden_size, 3 * hidden_size)
            gates[:, doubled].mul_(2)
            doubled_hh = w_hh.clone()
            doubled_hh[doubled].mul_(2)
            recurrent = StepWeight(doubled_hh.t(), dtype, count)
            (hidden, h_steps), (cell, c_steps) = state_buffer(h_0, rows), state_buffer(c_0, rows)  # (B + N, H)
            tanh_c = torch.empty_like(hidden[count:])
            operand = operand_of_states(hidden, h_0, dtype)
            parts = [part.split(sizes) for part in (gates, *gates.split(hidden_size, 1), tanh_c, operand[count:])]
            h_before, c_before = operand[:count], c_0
            steps = zip(*parts, h_steps, c_steps, fewer_rows(sizes), strict=True)
            for gate, i, f, half_g, o, tanh, h_operand, h, c, fewer in steps:
                recurrent.add_to(gate, h_before[:fewer] if fewer else h_before)
                gate.sigmoid_()
                torch.mul(f, c_before[:fewer] if fewer else c_before, out=c).addcmul_(i, half_g, value=2).sub_(i)
                torch.mul(torch.tanh(c, out=tanh), o, out=h)
                if operand is not hidden:
                    h_operand.copy_(h)
                h_before, c_before = h_operand, c
        ctx.save_for_backward(input_operand, w_ih, w_hh, gates, operand, cell, tanh_c)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last], cell[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor, to_c: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, gates, hidden, cell, tanh_c = ctx.saved_tensors
        rows, hidden_size, sizes = ctx.rows, w_hh.shape[1], ctx.rows.batch_sizes
        recurrent = StepWeight(w_hh, ctx.dtype, len(to_h))
        before = states_before(rows)
        to_h_0, to_states = state_gradients(to_output, to_h, rows)
        to_cell = to_c.clone()  # (B, H) gradient of c, summed from the later steps
        d_gates = torch.empty_like(gates)
        operand = operand_of(d_gates, ctx.dtype)
        d_parts = [part.split(sizes) for part in (*d_gates.split(hidden_size, 1), d_gates, operand[: len(d_gates)])]
        for first, end in reversed(spans_of(rows, hidden_size)):
            span = slice(rows.offsets[first], rows.offsets[end - 1] + sizes[end - 1])
            i, f, half_g, o = gates[span].split(hidden_size, 1)  # (R, H) each, of the R packed rows in the span
            g = half_g.mul(2).sub_(1)
            # gradient of a gate = slope * gradient of c (i, f, g) or of h (o); c's gradient grows by cell_slope * h's
            slope_i, slope_f, slope_g, slope_o = d_gates[span].split(hidden_size, 1)
            sigmoid_backward(g, i, grad_input=slope_i)
            sigmoid_backward(cell.index_select(0, before[span]), f, grad_input=slope_f)
            tanh_backward(i, g, grad_input=slope_g)
            sigmoid_backward(tanh_c[span], o, grad_input=slope_o)
            cell_slopes = tanh_backward(o, tanh_c[span]).split(sizes[first:end])
            forgets = f.split(sizes[first:end])
            for step in reversed(range(first, end)):
                to_i, to_f, to_g, to_o, d_gate, d_operand = (part[step] for part in d_parts)
                d_h, d_c, earlier = to_states[step], to_cell[: sizes[step]], to_states[step - 1] if step else to_h_0
                d_c.addcmul_(d_h, cell_slopes[step - first])
                to_i.mul_(d_c)
                to_f.mul_(d_c)
                to_g.mul_(d_c)
                to_o.mul_(d_h)
                d_c.mul_(forgets[step - first])
                if operand is not d_gates:
                    d_operand.copy_(d_gate)
                recurrent.add_to(earlier[: sizes[step]], d_operand)
        to_inputs, to_ih, to_bias = input_gradients(ctx, inputs, w_ih, d_gates, operand)
        to_hh = recurrence_gradient(w_hh, operand, hidden, before)
        return to_inputs, to_h_0, to_cell, to_ih, to_hh, to_bias, to_bias, None


class GRULayer(torch.autograd.Function):
    """`apply(inputs (N, I), h_0 (B, H), w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n (B, H)`.

    r = s(W_ir x + b_ir + W_hr h + b_hr), z in the same way, n = tanh(W_in x + b_in + r (W_hn h + b_hn)),
    h' = (1 - z) n + z h (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html).

    This is PyTorch's and cuDNN's form. Course notes often write h' = (1 - z) h + z n, with z meaning the opposite,
    and apply r before the product: n = tanh(W [r h, x]).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h_0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, rows: PackedRows
    ) -> tuple[Tensor, Tensor]:
        dtype, hidden_size, sizes, count = product_dtype(inputs), w_hh.shape[1], rows.batch_sizes, len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            input_operand, gates = project(inputs, w_ih, dtype)
            gates.add_(b_ih)
            from_hidden = b_hh.repeat(len(inputs), 1)  # (N, 3H): W_h h + b_h; the backward pass needs its part for n
            recurrent = StepWeight(w_hh.t(), dtype, count)
            hidden, h_steps = state_buffer(h_0, rows)
            operand = operand_of_states(hidden, h_0, dtype)
            hidden_rz, hidden_n = from_hidden.split([2 * hidden_size, hidden_size], 1)
            rz = gates[:, : 2 * hidden_size]
            buffers = (from_hidden, rz, hidden_rz, *gates.split(hidden_size, 1), hidden_n, operand[count:])
            parts = [buffer.split(sizes) for buffer in buffers]
            earlier, earlier_operand = h_0, operand[:count]
            steps = zip(*parts, h_steps, fewer_rows(sizes), strict=True)
            for h_gates, gate_rz, h_rz, r, z, n, h_n, h_operand, h, fewer in steps:
                recurrent.add_to(h_gates, earlier_operand[:fewer] if fewer else earlier_operand)
                gate_rz.add_(h_rz).sigmoid_()
                n.addcmul_(r, h_n).tanh_()
                earlier = torch.lerp(n, earlier[:fewer] if fewer else earlier, z, out=h)
                if operand is not hidden:
                    h_operand.copy_(h)
                earlier_operand = h_operand
        ctx.save_for_backward(input_operand, w_ih, w_hh, gates, hidden_n, hidden, operand)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, gates, hidden_n, hidden, hidden_operand = ctx.saved_tensors
        rows, hidden_size, sizes = ctx.rows, w_hh.shape[1], ctx.rows.batch_sizes
        recurrent = StepWeight(w_hh, ctx.dtype, len(to_h))
        before = states_before(rows)
        to_h_0, to_states = state_gradients(to_output, to_h, rows)
        d_gates = torch.empty_like(gates)  # gradient of W_h h + b_h, which differs from that of W_i x + b_i for n
        operand = operand_of(d_gates, ctx.dtype)
        to_n_input = torch.empty_like(to_output, memory_format=torch.contiguous_format)  # (N, H) of W_i x + b_i for n
        buffers = (*d_gates.split(hidden_size, 1), to_n_input, d_gates, operand[: len(d_gates)])
        d_parts = [buffer.split(sizes) for buffer in buffers]
        for first, end in reversed(spans_of(rows, hidden_size)):
            span = slice(rows.offsets[first], rows.offsets[end - 1] + sizes[end - 1])
            r, z, n = gates[span].split(hidden_size, 1)  # (R, H) each, of the R packed rows in the span
            # gradient of each gate = slope * gradient of h
            slope_r, slope_z, slope_n = d_gates[span].split(hidden_size, 1)
            input_slope = tanh_backward(1 - z, n, grad_input=to_n_input[span])
            sigmoid_backward(input_slope * hidden_n[span], r, grad_input=slope_r)
            earlier = hidden.index_select(0, before[span])
            sigmoid_backward(earlier.sub_(n), z, grad_input=slope_z)
            torch.mul(input_slope, r, out=slope_n)
            updates = z.split(sizes[first:end])
            for step in reversed(range(first, end)):
                to_r, to_z, to_n, to_input, d_gate, d_operand = (part[step] for part in d_parts)
                d_h = to_states[step]
                to_r.mul_(d_h)
                to_z.mul_(d_h)
                to_n.mul_(d_h)
                to_input.mul_(d_h)
                if operand is not d_gates:
                    d_operand.copy_(d_gate)
                to_earlier = (to_states[step - 1] if step else to_h_0)[: sizes[step]]
                recurrent.add_to(to_earlier.addcmul_(d_h, updates[step - first]), d_operand)
        to_hh = recurrence_gradient(w_hh, operand, hidden_operand, before)
        to_bias_hh = d_gates.sum(0)
        d_gates[:, 2 * hidden_size :] = to_n_input
        if operand is not d_gates:
            operand[: len(to_n_input), 2 * hidden_size :] = to_n_input
        to_inputs, to_ih, to_bias_ih = input_gradients(ctx, inputs, w_ih, d_gates, operand)
        return to_inputs, to_h_0, to_ih, to_hh, to_bias_ih, to_bias_hh, None


class RNNLayer(torch.autograd.Function):
    """`apply(inputs (N, I), h_0 (B, H), w_ih, w_hh, b_ih, b_hh, rows) -> output (N, H), h_n (B, H)`.

    h' = tanh(W_i x + b_i + W_h h + b_h) (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, h_0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, rows: PackedRows
    ) -> tuple[Tensor, Tensor]:
        dtype, count = product_dtype(inputs), len(h_0)
        with torch.autocast(inputs.device.type, enabled=False):
            input_operand, projected = project(inputs, w_ih, dtype)
            hidden, h_steps = state_buffer(h_0, rows)
            torch.add(projected, b_ih + b_hh, out=hidden[count:])
            recurrent = StepWeight(w_hh.t(), dtype, count)
            operand = operand_of_states(hidden, h_0, dtype)
            earlier = operand[:count]
            sizes = rows.batch_sizes
            for h, h_operand, fewer in zip(h_steps, operand[count:].split(sizes), fewer_rows(sizes), strict=True):
                recurrent.add_to(h, earlier[:fewer] if fewer else earlier)
                h.tanh_()
                if operand is not hidden:
                    h_operand.copy_(h)
                earlier = h_operand
        ctx.save_for_backward(input_operand, w_ih, w_hh, hidden, operand)
        ctx.rows, ctx.dtype = rows, dtype
        return hidden[count:], hidden[count + rows.last]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_output: Tensor, to_h: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hidden, hidden_operand = ctx.saved_tensors
        rows = ctx.rows
        recurrent = StepWeight(w_hh, ctx.dtype, len(to_h))
        to_h_0, to_states = state_gradients(to_output, to_h, rows)
        d_gates = 1 - hidden[len(to_h) :].square()  # (N, H)
        operand = operand_of(d_gates, ctx.dtype)
        sizes = rows.batch_sizes
        steps = zip(d_gates.split(sizes), operand[: len(d_gates)].split(sizes), strict=True)
        for step, (d_gate, d_operand) in reversed(list(enumerate(steps))):
            d_gate.mul_(to_states[step])
            if operand is not d_gates:
                d_operand.copy_(d_gate)
            earlier = to_states[step - 1] if step else to_h_0
            recurrent.add_to(earlier[: len(d_gate)], d_operand)
        to_inputs, to_ih, to_bias = input_gradients(ctx, inputs, w_ih, d_gates, operand)
        to_hh = recurrence_gradient(w_hh, operand, hidden_operand, states_before(rows))
        return to_inputs, to_h_0, to_ih, to_hh, to_bias, to_bias, None
