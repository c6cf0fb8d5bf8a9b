"""Averages of the weights over optimizer steps. The average is validated and saved, the weights are trained.

The vectors of n-grams are not averaged: a step moves few of them, and to average all would take longer than the step.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lmtrain.model.language_model import LanguageModel
from lmtrain.runs.weights import named_weights


def averaged_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return the weights that are averaged, by name."""
    return {name: weight for name, weight in named_weights(model).items() if not name.startswith("ngram_embeddings.")}


class Averaging:
    """The average of a model's weights, from the step on at which it is begun.

    Args:
        name: `ema`, the exponential moving average (Polyak and Juditsky 1992; its memory is shorter at first, as in
            TensorFlow's `ExponentialMovingAverage`); `triggered`, the mean over all steps since it was begun (Merity et
            al. 2018, https://arxiv.org/abs/1708.02182); None for no average.
        decay: of ema: the factor by which each step multiplies the average before it adds the weights.
    """

    def __init__(self, model: LanguageModel, *, name: Literal["ema", "triggered"] | None, decay: float) -> None:
        self.model, self.name, self.decay = model, name, decay
        self.steps = 0  # optimizer steps in the average
        self.averages: dict[str, Tensor] = {}
        if name == "ema":
            self.begin()

    @property
    def active(self) -> bool:
        """Whether there is an average."""
        return bool(self.averages)

    @torch.no_grad()
    def begin(self) -> None:
        """Begin the average with the weights as they are."""
        self.averages = {name: weight.detach().clone() for name, weight in averaged_weights(self.model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step to the average."""
        if not self.active:
            return
        self.steps += 1
        if self.name == "ema":
            fraction = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        else:
            fraction = 1 / (self.steps + 1)
        for name, weight in averaged_weights(self.model).items():
            self.averages[name].lerp_(weight.detach(), fraction)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averaged weights within this context, and its own back afterwards, bit for bit."""
        if not self.active:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in averaged_weights(self.model).items()}
        self._set_weights(self.averages)
        try:
            yield
        finally:
            self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in averaged_weights(self.model).items():
            weight.copy_(tensors[name])

    def resume(self, steps: int | None) -> None:
        """Prepare for a saved average over `steps` optimizer steps, whose tensors the caller then copies into
        `averages`. None: no average was saved."""
        if steps is None:
            self.averages = {}
        elif not self.active:
            self.begin()
        self.steps = steps or 0
