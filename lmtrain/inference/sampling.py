"""Which token comes next: the most probable one, or one drawn at random from the probable ones.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. What is set takes effect from the top down, each on what the one before has left.

    Raises:
        ConfigError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that stand in the text already are divided by this where positive, multiplied where negative
    (Keskar et al. 2019, https://arxiv.org/abs/1909.05858)."""
    temperature: float = 1.0
    """Logits are divided by this; 0: the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens."""
    top_p: float = 1.0
    """Only the most probable tokens that hold this share together (Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751)."""
    min_p: float = 0.0
    """Only tokens with this share of the most probable one's probability (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082)."""
    seed: int = 0
    """The same seed, model and prompt give the same text, whatever else is in the batch."""

    def __post_init__(self) -> None:
        for name, sound, wanted in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "greater than 0 and finite"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or greater and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or greater"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed >= 0, "0 or greater"),
        ):
            if not sound:
                raise ConfigError(f"{name}: should be {wanted}, not {getattr(self, name)}")

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """What a token is drawn from, (B, V) float64 on CPU, each row's sum 1.

        Args:
            logits: (B, V), -inf for tokens that never follow.
            seen: (B, V) bool, tokens that stand in a row's text; asked for with a repetition penalty alone.
        """
        logits = self.penalised(logits, seen).double().cpu()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double()
        found = (logits / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < found.shape[1]:
            best, places = found.topk(self.top_k)
            found = torch.zeros_like(found).scatter_(1, places, best)
            found /= found.sum(1, keepdim=True)
        if self.top_p < 1:
            ordered, places = found.sort(descending=True, stable=True)
            ordered[ordered.cumsum(1) - ordered >= self.top_p] = 0  # what stands before it holds the share already
            found = torch.zeros_like(found).scatter_(1, places, ordered)
            found /= found.sum(1, keepdim=True)
        if self.min_p > 0:
            found = found.where(found >= self.min_p * found.amax(1, keepdim=True), 0.0)
            found /= found.sum(1, keepdim=True)
        return found

    def penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (B, V) after the repetition penalty."""
        if seen is None:
            return logits
        against = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, against, logits)


def draws(seed: int, prompt: Sequence[int], number: int) -> np.random.Generator:
    """The random numbers of one text: of the number-th one to this prompt, whatever else is written beside it."""
    digest = hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest()
    return np.random.default_rng([seed, number, *np.frombuffer(digest, np.uint32)])


def draw(probabilities: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
    """A token (B,) of each row (B, V), by a number of its own generator."""
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    numbers = torch.tensor([generator.random() for generator in generators], dtype=torch.float64).unsqueeze(1)
    wanted = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))  # below the total, if rounded
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)  # where more is held: never a probability of 0
