"""From summed nats to the figures that are reported: sum, then divide once."""

import math
from dataclasses import dataclass

LN_2 = math.log(2.0)


@dataclass
class Tally:
    """Nats summed over the events (predicted tokens) that they belong to.

    A mean of means is wrong when batches differ in size, so sums are kept and divided once, at the end.
    """

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0  # events at which the best guess was right, where that is counted

    def add(self, nats: float, tokens: int, correct: int = 0) -> None:
        self.nats += nats
        self.tokens += tokens
        self.correct += correct

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood in nats; NaN where there was nothing to predict."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        return perplexity(self.nats_per_token)

    @property
    def accuracy(self) -> float:
        """Share of events whose best guess was right; NaN where there was nothing to predict."""
        return self.correct / self.tokens if self.tokens else math.nan


def perplexity(nats_per_token: float) -> float:
    """exp(nats per token); infinite where that overflows a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def bits_per(units: int, nats: float) -> float:
    """Bits spent on each of `units` characters or bytes; comparable between tokenizers."""
    return nats / LN_2 / units if units else math.nan
