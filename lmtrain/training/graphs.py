"""CUDA graphs of the forward and backward pass of a batch.

A recurrent layer launches some ten kernels at each time step, and a GPU runs most of them faster than a program can
launch them. A graph launches all kernels of a batch at once (https://docs.pytorch.org/docs/stable/notes/cuda.html,
"CUDA Graphs"). It runs the recorded kernels on the memory that they were recorded on, so each shape of a batch has a
graph of its own, and rows of different lengths are padded to a multiple of `PADDED_STEPS`, so that there are few
shapes. Padding is not scored. A batch without a graph runs the same kernels one by one, and has the same result.

Shapes: B rows, L longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Layout, Losses, Objective
from lmtrain.model.output import FullOutput
from lmtrain.model.states import ModelState
from lmtrain.system.device import random_state, set_random_state

PADDED_STEPS = 8  # rows of different lengths are padded to a multiple of this
MOST_GRAPHS = 64  # a graph takes some megabytes


class BatchGraphs:
    """The CUDA graphs of a model, and the gradients that they add to.

    Args:
        carries_state: whether the state at the end of a batch is the start of the next one; rows are then not padded.
    """

    def __init__(self, model: LanguageModel, carries_state: bool) -> None:
        self.model, self._graphs = model, dict[Any, _Graph]()
        self._pads = not carries_state and not model.activation_penalty and not model.temporal_penalty
        self._weights = list(model.parameters())
        self._gradients = [torch.zeros_like(weight) for weight in self._weights]
        self._pool: Any = None  # the memory that all graphs share, since only one of them runs at a time
        self._recording = Lock()  # work that another thread gives to the device would spoil a recording

    @staticmethod
    def can_record(model: LanguageModel) -> bool:
        """Tell whether a model can be recorded: the size of no tensor depends on the values of another one."""
        plain = isinstance(model.output, FullOutput) and model.sampled_tokens is None and not model.history_size
        return plain and not model.embedding.sparse and model.embedding.weight.device.type == "cuda"

    def lay_out(self, tokens: Tensor, lengths: Tensor, order: Tensor | None = None) -> Layout:
        """Lay out a batch as `LanguageModel.lay_out` does, but pad rows of different lengths."""
        longest, shortest = int(lengths[0]) - 1, int(lengths[-1]) - 1
        padded = -(-longest // PADDED_STEPS) * PADDED_STEPS if self._pads and shortest < longest else None
        with self._recording:
            return self.model.lay_out(tokens, lengths, order, padded)

    def add(
        self,
        layout: Layout,
        factors: Mapping[Objective, float],
        state: ModelState | None,
        precision: AbstractContextManager[Any],
    ) -> Losses:
        """Add the gradient of a batch to the gradients of the weights.

        Args:
            factors: the factor of each objective's nats in the loss.
            state: the state before the batch; None: nothing was read.
            precision: the context in which the matrix products run.

        Returns:
            The losses. The next batch of the same shape overwrites their tensors.
        """
        if self._weights[0].grad is None:  # the step begins
            torch._foreach_zero_(self._gradients)
            for weight, gradient in zip(self._weights, self._gradients, strict=True):
                weight.grad = gradient
        graph = self._graphs.get(layout.shape)
        if graph is None:
            if not layout.rows.equal or len(self._graphs) >= MOST_GRAPHS:
                return _add(self.model, layout, factors, state, precision)
            with self._recording:
                graph = self._graphs[layout.shape] = self._record(layout, precision)
        graph.layout.copy_(layout)
        for name, factor in graph.factors.items():
            factor.fill_(factors[name])
        parts = None if state is None else [part for layer in state.layers for part in layer]
        for number, recorded in enumerate(graph.state_parts):
            recorded.zero_() if parts is None else recorded.copy_(parts[number])
        graph.replay()
        return graph.losses

    def _record(self, layout: Layout, precision: AbstractContextManager[Any]) -> _Graph:
        """Record the graph of batches of one shape. The gradients and the random state stay as they are."""
        device = layout.inputs.device
        first = self.model.stack("forward").zero_state(layout.rows.batch_sizes[0], self._weights[0])
        state, layout = ModelState(first), layout.clone()
        factors: dict[Objective, Tensor] = {name: torch.zeros((), device=device) for name in self.model.objectives}
        random, stream = random_state(device), _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # what is done only once, such as choosing an algorithm, can't be recorded
            _add(self.model, layout, factors, state, precision)
        torch.cuda.current_stream(device).wait_stream(stream)
        set_random_state(random, device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            total, nats, end = _add(self.model, layout, factors, state, precision)
        self._pool = graph.pool()
        # the losses are detached: autograd's graph would keep the stream on which each weight's gradient was added up
        layers = tuple(tuple(part.detach() for part in layer) for layer in end.layers)
        losses = Losses(total.detach(), nats, ModelState(layers))
        return _Graph(graph.replay, layout, factors, [part for layer in first for part in layer], losses)


class _Graph(NamedTuple):
    """The CUDA graph of one shape, and the tensors that it reads and writes."""

    replay: Callable[[], None]
    layout: Layout
    factors: dict[Objective, Tensor]  # tensors ()
    state_parts: list[Tensor]  # tensors (B, H)
    losses: Losses


@cache
def _side_stream(device: torch.device) -> Any:
    """The stream on which all graphs are recorded: each stream takes some megabytes for matrix products."""
    return torch.cuda.Stream(device)


def _add(
    model: LanguageModel,
    layout: Layout,
    factors: Mapping[Objective, float | Tensor],
    state: ModelState | None,
    precision: AbstractContextManager[Any],
) -> Losses:
    with precision:
        losses = model.loss(layout.inputs, layout.rows.lengths, factors, state, layout)
    losses.total.backward()
    return losses
