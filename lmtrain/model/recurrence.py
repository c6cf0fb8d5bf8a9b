"""A stack of recurrent layers in one direction over packed rows, with dropout, layer norm and residuals.

Shapes: B rows, I input size of a layer, H hidden size of a layer, N packed rows (the sum of the lengths).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lmtrain.model.cells import CELLS, layer_weights
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
        if self.backend == "torch" or inputs.device.type != "cpu":
            return True
        return self.cell.fused_on_cpu and rows.equal and product_dtype(inputs) == torch.float32

    def _run_packed(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.cell.kernel.apply(inputs, *state, *weights, rows)
        return result

    def _run_torch(
        self, inputs: Tensor, rows: PackedRows, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        assert self.cell.torch_function is not None
        first = [part.unsqueeze(0) for part in state]
        initial = tuple(first) if len(first) > 1 else first[0]
        # biases, number of layers, dropout between layers, training, bidirectional
        settings = (list(weights), True, 1, 0.0, self.training, False)
        if rows.equal:
            columns = inputs.unflatten(0, (-1, rows.batch_sizes[0]))
            output, *last = self.cell.torch_function(columns, initial, *settings, False)  # time comes first
            output = output.flatten(0, 1)
        else:
            output, *last = self.cell.torch_function(inputs, torch.tensor(rows.batch_sizes), initial, *settings)
        return output, *(part.squeeze(0) for part in last)
