"""The figures of a run, under the tags that metrics.jsonl and TensorBoard share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmtrain.inference.scoring import Evaluation
from lmtrain.metrics import Tally
from lmtrain.model.objectives import Objective

LossWeights = Mapping[Objective, float]


def weighted_loss(tallies: Mapping[Objective, Tally], weights: LossWeights) -> float:
    """The loss: each objective's nats per token, times its weight."""
    return math.fsum(
        weight * tallies[objective].nats_per_token
        for objective, weight in weights.items()
        if weight and tallies[objective].tokens
    )


@dataclass
class Window:
    """What training has summed up since the last row of metrics; plain values, which a checkpoint keeps."""

    tallies: dict[Objective, list[float]] = field(default_factory=dict)  # [nats, tokens]
    places: int = 0  # tokens of the batches, padding counted
    padding: int = 0

    def add(self, nats: Mapping[Objective, float], events: Mapping[Objective, int], places: int, tokens: int) -> None:
        """Add one optimizer step, whose batches had so many tokens, and so many places with padding counted."""
        for objective, value in nats.items():
            sums = self.tallies.setdefault(objective, [0.0, 0])
            sums[0] += value
            sums[1] += events[objective]
        self.places += places
        self.padding += places - tokens

    def figures(
        self, weights: LossWeights, rate: float, norm: float, elapsed_s: float, waited_s: float
    ) -> dict[str, float]:
        """A row of training metrics; learning rate and gradient norm are those of the last step.

        Args:
            elapsed_s, waited_s: seconds the steps took, and how many of these they waited for batches.
        """
        tallies = {objective: Tally(nats, int(tokens)) for objective, (nats, tokens) in self.tallies.items()}
        return {
            "train/loss": weighted_loss(tallies, weights),
            "train/perplexity": tallies["forward"].perplexity,
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/tokens_per_second": tallies["forward"].tokens / max(1e-9, elapsed_s),
            "train/data_wait_fraction": waited_s / max(1e-9, elapsed_s),
            "train/padding_fraction": self.padding / self.places,
        }


def validation_figures(result: Evaluation, weights: LossWeights) -> dict[str, float]:
    """A row of validation metrics; the last two with two directions only."""
    figures = {"valid/loss": weighted_loss(result.tallies, weights), "valid/perplexity": result.perplexity}
    if "backward" in result.tallies:
        figures["valid/backward_perplexity"] = result.tallies["backward"].perplexity
        figures["valid/fill_accuracy"] = result.tallies["fill"].accuracy
    return figures


def describe_figures(figures: Mapping[str, float]) -> str:
    """Validation metrics for people."""
    return ", ".join(f"{tag.removeprefix('valid/').replace('_', ' ')} {value:.4f}" for tag, value in figures.items())
