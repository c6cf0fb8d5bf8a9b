"""The gradient of a step, summed over the processes that train together while it is still being computed.

PyTorch's `DistributedDataParallel` (Li et al. 2020, https://arxiv.org/abs/2006.15704) sums the gradients of some
megabytes of weights at a time, as soon as they are computed. The loss is a sum of nats divided once by the number of
tokens of all processes, so gradients are summed, not averaged.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lmtrain.data.batches.rows import Batch
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Layout, Losses, Objective
from lmtrain.model.states import ModelState
from lmtrain.system.device import random_state, set_random_state
from lmtrain.system.processes import SingleProcess
from lmtrain.training.graphs import BatchGraphs


class _Loss(nn.Module):
    """A model whose forward pass is its loss, as `DistributedDataParallel` needs it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Losses:
        return self.model.loss(*arguments)


class Gradients:
    """Forward and backward passes of one process, whose gradients are summed over all processes.

    Args:
        carries_state: whether the state at the end of a batch is the start of the next one.
    """

    def __init__(self, model: LanguageModel, processes: SingleProcess, carries_state: bool = False) -> None:
        self.model, self.processes = model, processes
        self.complete_s = 0.0  # when this process had computed its last gradient, by `time.perf_counter`
        self._loss, self._parallel = _Loss(model), None
        self._graphs = None
        if not processes.under_torchrun:
            if BatchGraphs.can_record(model):
                self._graphs = BatchGraphs(model, carries_state)
            return
        from torch.nn.parallel import DistributedDataParallel

        # DistributedDataParallel sums sparse gradients with gloo only, so `_sum_sparse` does it
        self._sparse = [
            *model.ngram_embeddings.parameters(),
            *([model.embedding.weight] if model.embedding.sparse else []),
        ]
        names = {name for name, weight in self._loss.named_parameters() if any(weight is own for own in self._sparse)}
        names |= {name for name, _ in self._loss.named_buffers()}  # every process computes the same buffers
        self._loss._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
        with processes.communicating():
            self._parallel = DistributedDataParallel(self._loss, gradient_as_bucket_view=True)
        self._parallel.register_comm_hook(None, lambda state, bucket: self._sum_bucket(bucket))

    _parallel: Any

    @property
    def lay_out(self) -> Callable[..., Layout]:
        """The function that lays out a batch for `add`; it takes the arguments of `LanguageModel.lay_out`."""
        return self.model.lay_out if self._graphs is None else self._graphs.lay_out

    def _sum_bucket(self, bucket: Any) -> Any:
        if bucket.is_last():
            self.complete_s = time.perf_counter()
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda summed: summed.value()[0])

    def add(
        self,
        batch: Batch,
        weights: Mapping[Objective, float],
        state: ModelState | None,
        precision: AbstractContextManager[Any],
        last: bool,
        layout: Layout | None = None,
    ) -> Losses:
        """Add the gradient of a batch to the gradients of the weights.

        Args:
            weights, state, layout: as for `LanguageModel.loss`.
            precision: the context in which the matrix products run.
            last: whether this is the last batch of the step; only then are gradients summed over the processes.
        """
        if self._graphs is not None and layout is not None:
            return self._graphs.add(layout, weights, state, precision)
        layout = self.model.lay_out(batch.tokens, batch.lengths, batch.order) if layout is None else layout
        run = self._loss if self._parallel is None else self._parallel
        alone = nullcontext() if self._parallel is None or last else self._parallel.no_sync()
        with self.processes.communicating(), alone:
            with precision:
                losses: Losses = run(batch.tokens, batch.lengths, weights, state, layout)
            losses.total.backward()
        if last:
            if self._parallel is None:
                self.complete_s = time.perf_counter()
            else:
                self._sum_sparse()
        return losses

    def _sum_sparse(self) -> None:
        """Sum the sparse gradients, which `DistributedDataParallel` leaves out: each process has other rows of them."""
        for weight in self._sparse:
            assert weight.grad is not None
            gradient = weight.grad.coalesce()
            indices, values = gradient.indices(), gradient.values()
            longest = int(max(count for (count,) in self.processes.gather([len(values)])))
            padding = longest - len(values)  # adds 0 to the first row
            all_indices = self.processes.gather_tensor(nn.functional.pad(indices, (0, padding)))
            all_values = self.processes.gather_tensor(nn.functional.pad(values, (0, 0, 0, padding)))
            weight.grad = torch.sparse_coo_tensor(torch.cat(all_indices, 1), torch.cat(all_values), weight.shape)

    def warm_up(self, batch: Batch, precision: AbstractContextManager[Any]) -> None:
        """Pass once over a batch without using the result. After its first pass DistributedDataParallel groups the
        gradients anew, by the order in which they come. With three processes or more the last digits of a sum depend on
        the groups, and a resumed run must have the same sums as one that was never stopped."""
        if self._parallel is None:
            return
        device = self.model.embedding.weight.device
        random = random_state(device)
        self.add(batch, dict.fromkeys(self.model.objectives, 0.0), None, precision, last=True)
        set_random_state(random, device)
        for weight in self.model.parameters():
            weight.grad = None
