"""One training step, from its batches to the weights that it moves.

The trainer, `lmtrain check` and scripts/benchmark.py all call it.

A step takes `training.accumulate` batches. Their nats are summed, over all processes, and divided once by the number of
tokens predicted: a mean of means would be wrong, since batches differ in size.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.batches.loader import RankBatch
from lmtrain.errors import DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Objective, count_events
from lmtrain.model.states import CarriedState
from lmtrain.system.device import autocast
from lmtrain.system.processes import SingleProcess
from lmtrain.training.averaging import Averaging
from lmtrain.training.figures import LossWeights
from lmtrain.training.optimization import (
    build_optimizers,
    clip_gradient,
    has_sparse_embedding,
    optimizer_step,
    set_learning_rate,
)
from lmtrain.training.parallel import Gradients


class StepFigures(NamedTuple):
    """The figures of one step, over all processes."""

    nats: dict[Objective, float]  # summed over the events of each objective
    events: dict[Objective, int]  # tokens that each objective predicted
    tokens: int  # tokens of the batches, start and end tokens included
    padded_tokens: int  # the same tokens and the padding
    learning_rate: float
    gradient_norm: float  # before clipping
    rank_wait_s: float  # seconds that a process waited for the slowest one, on average
    shared: list[list[float]]  # the `shared` numbers of each process, by rank


class TrainingStep:
    """One training step, with the model, the optimizers and the state that it works on.

    Attributes:
        model, optimizers, averaging: what a checkpoint keeps and a resume restores.
        carried: the hidden state that is carried from batch to batch; None where each row is a sequence of its own.
        precision: precision of the matrix products, `fp32` or `bf16`; set it before the first step.
        synchronised_s: when the processes last exchanged numbers, by `time.perf_counter`.
        lay_out: the function that a `BatchLoader` calls to move each batch to the device; None on the CPU.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        columns: int | None = None,
        processes: SingleProcess | None = None,
    ) -> None:
        """Build the optimizers, the average and the gradients of a model that lies on its device already.

        Args:
            columns: rows whose hidden state is carried from batch to batch, over all processes; None for none.
        """
        self.processes = processes = processes or SingleProcess()
        self.model, self.device = model, model.embedding.weight.device
        self.precision, self.synchronised_s = "fp32", 0.0
        self.clip_grad_norm = config.optimizer.clip_grad_norm
        model.embedding.sparse = has_sparse_embedding(model, config.optimizer.name, config.optimizer.weight_decay)
        self.optimizers = build_optimizers(model, **config.optimizer.model_dump(exclude={"clip_grad_norm"}))
        self.averaging = Averaging(model, name=config.averaging.name, decay=config.averaging.decay)
        self.gradients = Gradients(model, processes, columns is not None)
        self.lay_out = None if self.device.type == "cpu" else self.gradients.lay_out
        self.carried = None if columns is None else CarriedState(columns // processes.world_size)
        weights = config.training.loss_weights.model_dump()
        self.loss_weights: LossWeights = {objective: weights[objective] for objective in model.objectives}

    def __call__(
        self, batches: Sequence[RankBatch], learning_rate: float, number: int = 1, shared: Sequence[float] = ()
    ) -> StepFigures:
        """Train on the batches of one step.

        Args:
            batches: this process's part of each; events are counted over the parts of all processes.
            number: the number of the step, for error messages.
            shared: numbers of this process that every process should know; they are exchanged with the nats.

        Raises:
            DivergedError: the loss or the gradient is not finite. The weights have not moved then.
        """
        # 1. How many tokens does each objective predict? The loss is divided by that number.
        counts = [count_events(each.rows, each.tokens) for each in batches]
        events = {objective: sum(count[objective] for count in counts) for objective in self.loss_weights}
        weights = {name: weight / max(1, events[name]) for name, weight in self.loss_weights.items()}

        # 2. Forward and backward pass of each batch. Gradients add up; processes sum theirs during the last pass.
        own_nats: list[Tensor] = []  # () of each objective, batch after batch
        padded_tokens = 0
        for place, each in enumerate(batches, 1):
            batch, carried = each.batch, None if each.idle else self.carried
            losses = self.gradients.add(
                batch,
                dict.fromkeys(weights, 0.0) if each.idle else weights,
                None if carried is None else carried.of(each.order),
                autocast(self.precision, self.device),
                last=place == len(batches),
                layout=each.layout,
            )
            if carried is not None:
                carried.store(each.order, losses.state)
            if not each.idle:
                padded_tokens += batch.tokens.numel()
            own_nats += [torch.zeros_like(part) if each.idle else part.clone() for part in losses.nats.values()]

        # 3. Exchange: every process gets the nats of all processes. A step waits for the device only here, to fetch
        # the nats and the norm of the gradient.
        own_busy_s, by_rank = self.gradients.complete_s - self.synchronised_s, list[list[float]]()

        def fetch(gradient_numbers: list[Tensor]) -> list[float]:
            by_rank[:], numbers = self._exchange((own_busy_s, padded_tokens, *shared), own_nats, gradient_numbers)
            self.synchronised_s = time.perf_counter()
            return numbers

        # 4. Clip the gradient, and stop before the update if something is not finite.
        norm = clip_gradient(self.model.parameters(), self.clip_grad_norm, fetch)
        busy_s, all_padded_tokens, *rest = zip(*by_rank, strict=True)
        all_shared, rest = rest[: len(shared)], rest[len(shared) :]  # each number of each process, by rank
        by_objective = {name: rest[place :: len(weights)] for place, name in enumerate(weights)}
        nats = {name: math.fsum(map(sum, zip(*parts, strict=True))) for name, parts in by_objective.items()}
        if not math.isfinite(norm) or not all(map(math.isfinite, nats.values())):
            raise DivergedError(
                f"step {number}: the loss or its gradient is not finite (learning rate {learning_rate:g}, gradient "
                f"norm {norm:g}); try a lower optimizer.lr, a longer schedule.warmup_steps or a smaller "
                "optimizer.clip_grad_norm; the weights saved last are sound"
            )

        # 5. Update the weights, then their average.
        set_learning_rate(self.optimizers, learning_rate)
        optimizer_step(self.optimizers)
        self.averaging.update()

        # 6. The figures of the step.
        return StepFigures(
            nats,
            events,
            sum(each.tokens for each in batches),
            int(sum(all_padded_tokens)),
            learning_rate,
            norm,
            max(busy_s) - sum(busy_s) / len(busy_s),
            [list(numbers) for numbers in zip(*all_shared, strict=True)],
        )

    def _exchange(
        self, own: Sequence[float], nats: list[Tensor], gradient_numbers: list[Tensor]
    ) -> tuple[list[list[float]], list[float]]:
        """Return the numbers of each process, by rank: its `own`, then its `nats`. Return also the values of
        `gradient_numbers`, which are the same in every process."""
        if self.device.type == "cpu":
            return self.processes.gather([*own, *map(float, nats)]), [float(number) for number in gradient_numbers]
        own_nats, of_norm = torch.stack(nats), torch.stack([number.to(nats[0].dtype) for number in gradient_numbers])
        if not self.processes.under_torchrun:
            numbers = torch.cat([own_nats, of_norm]).tolist()
            return [[*own, *numbers[: len(nats)]]], numbers[len(nats) :]
        sent = torch.tensor(own, dtype=torch.float64).pin_memory().to(self.device, non_blocking=True)
        parts = self.processes.gather_tensor(torch.cat([sent, own_nats]))
        numbers, size = torch.cat([*parts, of_norm]).tolist(), len(parts[0])
        ends = range(size, len(parts) * size + 1, size)
        return [numbers[end - size : end] for end in ends], numbers[len(parts) * size :]

    def end_epoch(self) -> None:
        """Forget the carried hidden state: the next batch is the beginning of the text."""
        if self.carried is not None:
            self.carried.clear()

    def warm_up(self, batch: RankBatch) -> None:
        """Make several processes ready to train, see `Gradients.warm_up`; no weight and no random state changes."""
        self.gradients.warm_up(batch.batch, autocast(self.precision, self.device))
