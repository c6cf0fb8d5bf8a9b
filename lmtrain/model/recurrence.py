"""A stack of recurrent layers in one direction over packed rows, with dropout, layer norm and residuals.

Shapes: B rows, I input size of a layer, H hidden size of a layer, N packed rows (the sum of the lengths).
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmtrain.model.cells import CELLS, Cell, layer_weights
from lmtrain.model.dropout import drop, drop_locked
from lmtrain.model.packing import PackedRows
from lmtrain.model.products import product_dtype
from lmtrain.model.states import StackState

Backend = Literal["auto", "packed", "torch"]


class RecurrentStack(nn.Module):
    """Recurrent layers in one direction; each layer's weights have the names that PyTorch's modules give them.

    Args:
        cell: a name in `CELLS`.
        hidden_sizes: H of each layer, from the input up.
        backend: `packed` runs lmtrain's kernels; `torch` runs PyTorch's (cuDNN on CUDA, on CPU oneDNN's fused LSTM for
            rows of equal length); `auto` takes the faster one for the device, cell, precision and lengths. A cell that
            PyTorch lacks always runs lmtrain's kernel.
        dropout: fraction of each layer's output that is zeroed before the next layer in training.
        layer_dropout: the same for whole features, which stay zero at all steps of a row.
        weight_dropout: fraction of each recurrent weight that is zeroed for a batch in training: DropConnect (Merity et
            al. 2018, https://arxiv.org/abs/1708.02182). The kernel gets the masked weight, the optimizer the whole.
        layer_norm: normalise each layer's output (Ba et al. 2016, https://arxiv.org/abs/1607.06450), outside of the
            recurrence, which keeps its fast kernels.
        residual: add a layer's input to its output when both have one size: He et al. 2016,
            https://arxiv.org/abs/1512.03385.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_sizes: Sequence[int],
        dropout: float = 0.0,
        backend: Backend = "auto",
        *,
        layer_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.cell, self.backend, self.hidden_sizes = CELLS[cell], backend, tuple(hidden_sizes)
        self.dropout, self.layer_dropout, self.weight_dropout = dropout, layer_dropout, weight_dropout
        self.residual = residual
        # each layer is a module: cuDNN's own dropout between layers keeps a random state that cannot be saved
        sizes = zip((input_size, *self.hidden_sizes), self.hidden_sizes, strict=False)
        self.layers = nn.ModuleList(self.cell.layer(before, size) for before, size in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in self.hidden_sizes if layer_norm)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give each gate an orthogonal recurrent weight (Saxe et al. 2014, https://arxiv.org/abs/1312.6120) and its
        `start_bias` (the LSTM's: Jozefowicz et al. 2015, https://proceedings.mlr.press/v37/jozefowicz15.html)."""
        for size, layer in zip(self.hidden_sizes, self.layers, strict=True):
            _, weight_hh, bias_ih, bias_hh = layer_weights(layer)
            if not weight_hh.is_meta:
                for gate_weight in weight_hh.split(size):
                    nn.init.orthogonal_(gate_weight)
            bias_ih.zero_()
            bias_hh.zero_()
            for gate, value in self.cell.start_bias.items():
                bias_ih[gate * size : (gate + 1) * size] = value

    def describe_precision(self, precision: str, device: torch.device) -> str:
        """Say in words in which precision a device runs these layers, if matrix products run in `precision`."""
        wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        by_torch = self.cell.torch_function is not None
        if self.backend == "packed" or not by_torch or recurrence_dtype(self.cell, wanted, device) != torch.float32:
            return f"recurrent layers in {precision}"
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return f"recurrent layers in fp32{' with TF32' if tf32 else ''}"

    def zero_state(self, batch_size: int, like: Tensor) -> StackState:
        """Return zeros (B, H) for each layer's states, with the dtype and device of `like`."""
        return tuple(tuple(like.new_zeros(batch_size, size) for _ in self.cell.states) for size in self.hidden_sizes)

    def forward(self, inputs: Tensor, rows: PackedRows, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """Read packed inputs (N, I), laid out by `rows`, from a state (None: zeros); return the last layer's output
        (N, H) and the state after each row's last step."""
        if state is None:
            state = self.zero_state(rows.batch_sizes[0], inputs)
        run = self._run_torch if self._uses_torch(inputs, rows) else self._run_packed
        new_state = []
        for number, layer in enumerate(self.layers):
            layer_inputs = inputs
            if number:
                inputs = drop(inputs, self.dropout, self.training)
                inputs = drop_locked(inputs, rows, self.layer_dropout, self.training)
            weight_ih, weight_hh, *biases = layer_weights(layer)
            weights = (weight_ih, drop(weight_hh, self.weight_dropout, self.training), *biases)
            output, *last = run(inputs, rows, state[number], weights)
            inputs = self._finish_layer(number, layer_inputs, output)
            new_state.append(tuple(last))
        return inputs, tuple(new_state)

    def step(self, inputs: Tensor, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """Read one token of each row, inputs (B, I); return the output (B, H) and the state after it.

        This runs the cell's `step`, whatever the backend, and without dropout: it is not for training.
        """
        if state is None:
            state = self.zero_state(len(inputs), inputs)
        new_state = []
        for number, layer in enumerate(self.layers):
            last = self.cell.step(inputs, state[number], *layer_weights(layer))
            inputs = self._finish_layer(number, inputs, last[0])
            new_state.append(last)
        return inputs, tuple(new_state)

    def _finish_layer(self, number: int, inputs: Tensor, output: Tensor) -> Tensor:
        """Apply layer norm and the residual connection to a layer's output (..., H)."""
        if self.norms:
            output = self.norms[number](output)
        return output + inputs if self.residual and inputs.shape == output.shape else output

    def _uses_torch(self, inputs: Tensor, rows: PackedRows) -> bool:
        if self.cell.torch_function is None or self.backend == "packed":
            return False
        if self.backend == "torch" or inputs.device.type not in ("cpu", "mps"):
            return True
        if inputs.device.type == "mps":  # where PyTorch's LSTM fails: https://github.com/pytorch/pytorch/issues/102911
            return False
        return self.cell.fused_on_cpu and rows.equal and product_dtype(inputs) == torch.float32

    def _run_packed(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.cell.kernel.apply(inputs, *state, *weights, rows)
        return result

    def _run_torch(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run a layer by PyTorch's function; states come in and go out in the dtype of the weights, float32.

        Under autocast, PyTorch's wrapper of cuDNN casts to float16, whatever autocast's dtype is, and gradients of
        states are below the normal numbers of float16. So on a device the function runs without autocast, and its
        operands are cast here. cuDNN has a backward pass only with `train`; dropout is 0, so `train` changes no number.
        """
        device, sizes = inputs.device, rows.batch_sizes
        if device.type == "cpu":
            return _call_torch(self.cell, inputs, sizes, state, weights, self.training)
        wanted, kept, train = product_dtype(inputs), weights[0].dtype, self.training or torch.is_grad_enabled()
        with torch.autocast(device.type, enabled=False):
            dtype = recurrence_dtype(self.cell, wanted, device)
            if device.type != "mps":  # Apple's GPU has no cuDNN
                weights = in_one_buffer(weights, dtype)
            inputs, state = inputs.to(dtype), [part.to(dtype) for part in state]
            results = _call_torch(self.cell, inputs, sizes, state, weights, train)
        return tuple(part.to(kept) for part in results)


def _call_torch(
    cell: Cell, inputs: Tensor, sizes: list[int], state: Sequence[Tensor], weights: Sequence[Tensor], train: bool
) -> tuple[Tensor, ...]:
    """Call PyTorch's function of a cell on packed inputs (N, I) of `sizes` rows at each step."""
    assert cell.torch_function is not None
    first = [part.unsqueeze(0).contiguous() for part in state]
    initial = tuple(first) if len(first) > 1 else first[0]
    # biases, number of layers, dropout between layers, training, bidirectional
    settings = (list(weights), True, 1, 0.0, train, False)
    if sizes[-1] == sizes[0]:
        columns = inputs.unflatten(0, (-1, sizes[0]))
        output, *last = cell.torch_function(columns, initial, *settings, False)  # time comes first
        output = output.flatten(0, 1)
    else:
        output, *last = cell.torch_function(inputs, torch.tensor(sizes), initial, *settings)
    return output, *(part.squeeze(0) for part in last)


def recurrence_dtype(cell: Cell, wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which PyTorch's function of a cell runs on a device: `wanted`, but float32 where `wanted` is
    bf16 and cuDNN does not run the function in bf16."""
    possible = wanted != torch.bfloat16 or _cudnn_takes_bf16(cell.torch_function, cell.gates, len(cell.states), device)
    return wanted if possible else torch.float32


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def _cudnn_takes_bf16(function: Any, gates: int, states: int, device: torch.device) -> bool:
    """Tell whether cuDNN runs a cell's function in bf16 here, by calling it once. Where it does not, PyTorch raises, or
    runs the function slowly as single operations."""
    if device.type != "cuda":
        return False
    size = 8
    shapes = [(1, 1, size)] * (1 + states) + [(gates * size, size)] * 2 + [(gates * size,)] * 2
    made = [torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
    initial = tuple(made[1 : 1 + states]) if states > 1 else made[1]
    weights = in_one_buffer(made[1 + states :], torch.bfloat16)
    try:
        output, *_ = function(made[0], initial, list(weights), True, 1, 0.0, True, False, False)
    except RuntimeError:
        return False
    return output.grad_fn is not None and "Cudnn" in output.grad_fn.name()


def in_one_buffer(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return a layer's weights in a dtype and in one piece of memory, one after the other, as cuDNN reads them.

    Those of `nn.LSTM` lie that way already and are not copied. A weight with dropout, or a deep copy, lies elsewhere:
    PyTorch would warn and copy the weights at each call, which takes longer than the copy here.
    """
    in_a_row = all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in itertools.pairwise(weights))
    # neighbours in memory may still be separate allocations
    if (
        weights[0].dtype == dtype
        and in_a_row
        and weights[0].untyped_storage().nbytes() >= sum(w.nbytes for w in weights)
    ):
        return weights
    copied: tuple[Tensor, ...] = _OneBuffer.apply(dtype, *weights)  # type: ignore[no-untyped-call]
    return copied


class _OneBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        sizes = [weight.numel() for weight in weights]
        buffer = weights[0].new_empty(sum(sizes), dtype=dtype)
        torch.cat([weight.reshape(-1) for weight in weights], out=buffer)
        return tuple(part.view_as(weight) for part, weight in zip(buffer.split(sizes), weights, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient.to(ctx.dtype) for gradient in gradients)
