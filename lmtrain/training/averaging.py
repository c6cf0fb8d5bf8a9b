"""Averages of the weights over optimizer steps: what is validated and saved is the average, what is trained is not.

The vectors of n-grams are left out, and taken as they are: a step moves few of them, and to average all would take
longer than the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lmtrain.model.language_model import LanguageModel
from lmtrain.runs.weights import named_weights


def averaged_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights that an average is taken of, by name."""
    return {name: weight for name, weight in named_weights(model).items() if not name.startswith("ngram_embeddings.")}


class Averaging:
    """The average of a model's weights, once it is begun.

    Args:
        name: `ema`, the exponential moving average (Polyak and Juditsky 1992; decay as in TensorFlow's
            `ExponentialMovingAverage`: shorter at first); `triggered`, the mean of all steps since it was begun (Merity
            et al. 2018, https://arxiv.org/abs/1708.02182); None: none.
        decay: ema: what each step keeps of the average.
    """

    def __init__(self, model: LanguageModel, *, name: Literal["ema", "triggered"] | None, decay: float) -> None:
        self.model, self.name, self.decay = model, name, decay
        self.steps = 0  # that the average holds
        self.averages: dict[str, Tensor] = {}
        if name == "ema":
            self.begin()

    @property
    def active(self) -> bool:
        """Whether there is an average."""
        return bool(self.averages)

    @torch.no_grad()
    def begin(self) -> None:
        """Average from the weights as they are."""
        self.averages = {name: weight.detach().clone() for name, weight in averaged_weights(self.model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take an optimizer step into the average."""
        if not self.active:
            return
        self.steps += 1
        if self.name == "ema":
            share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        else:
            share = 1 / (self.steps + 1)
        for name, weight in averaged_weights(self.model).items():
            self.averages[name].lerp_(weight.detach(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights while this lasts, where there are such, and then its own, bit for bit."""
        if not self.active:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in averaged_weights(self.model).items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in averaged_weights(self.model).items():
            weight.copy_(tensors[name])

    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Put back an average that was saved."""
        self.averages = {
            name: averages[name].to(weight.device, copy=True) for name, weight in averaged_weights(self.model).items()
        }
        self.steps = steps
