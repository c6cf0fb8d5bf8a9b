"""The figures of a run, under the tags that metrics.jsonl and TensorBoard share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmtrain.inference.scoring import Evaluation
from lmtrain.metrics import Tally
from lmtrain.model.objectives import Objective

LossWeights = Mapping[Objective, float]


def weighted_loss(tallies: Mapping[Objective, Tally], weights: LossWeights) -> float:
    """Return the loss that is reported: the sum over objectives of nats per token times the objective's weight."""
    return math.fsum(
        weight * tallies[objective].nats_per_token
        for objective, weight in weights.items()
        if weight and tallies[objective].tokens
    )


@dataclass
class Window:
    """Sums over the training steps since the last row of metrics. They are plain values, which a checkpoint keeps."""

    tallies: dict[Objective, list[float]] = field(default_factory=dict)  # [nats, tokens]
    padded_tokens: int = 0  # tokens of the batches, start and end tokens and padding included
    padding: int = 0

    def add(
        self, nats: Mapping[Objective, float], events: Mapping[Objective, int], padded_tokens: int, tokens: int
    ) -> None:
        """Add the figures of one optimizer step, see `StepFigures`."""
        for objective, value in nats.items():
            sums = self.tallies.setdefault(objective, [0.0, 0])
            sums[0] += value
            sums[1] += events[objective]
        self.padded_tokens += padded_tokens
        self.padding += padded_tokens - tokens

    def figures(
        self, weights: LossWeights, rate: float, norm: float, elapsed_s: float, waited_s: float
    ) -> dict[str, float]:
        """Return a row of training metrics by tag.

        Args:
            rate, norm: learning rate and gradient norm of the last step.
            elapsed_s, waited_s: seconds that the steps took, and how many of these they waited for batches.
        """
        tallies = {objective: Tally(nats, int(tokens)) for objective, (nats, tokens) in self.tallies.items()}
        return {
            "train/loss": weighted_loss(tallies, weights),
            "train/perplexity": tallies["forward"].perplexity,
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/tokens_per_second": tallies["forward"].tokens / max(1e-9, elapsed_s),
            "train/data_wait_fraction": waited_s / max(1e-9, elapsed_s),
            "train/padding_fraction": self.padding / self.padded_tokens,
        }


def validation_figures(result: Evaluation, weights: LossWeights) -> dict[str, float]:
    """Return a row of validation metrics by tag; the last two exist with two directions only."""
    figures = {"valid/loss": weighted_loss(result.tallies, weights), "valid/perplexity": result.perplexity}
    if "backward" in result.tallies:
        figures["valid/backward_perplexity"] = result.tallies["backward"].perplexity
        figures["valid/fill_accuracy"] = result.tallies["fill"].accuracy
    return figures


def describe_figures(figures: Mapping[str, float]) -> str:
    """Validation metrics as a line for people."""
    return ", ".join(f"{tag.removeprefix('valid/').replace('_', ' ')} {value:.4f}" for tag, value in figures.items())
