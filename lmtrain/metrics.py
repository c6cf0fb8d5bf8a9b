"""Computes the reported figures from sums of nats, which are divided only once, at the end."""

import math
from dataclasses import dataclass

LN_2 = math.log(2.0)


@dataclass
class Tally:
    """Sums nats over predicted tokens. A mean of batch means would be wrong, since batches differ in size."""

    nats: float = 0.0
    tokens: int = 0
    correct: int = 0  # predicted tokens that the model held most probable; 0 if they are not counted

    def add(self, nats: float, tokens: int, correct: int = 0) -> None:
        self.nats += nats
        self.tokens += tokens
        self.correct += correct

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood in nats; NaN if there was nothing to predict."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite if that overflows a float."""
        return perplexity(self.nats_per_token)

    @property
    def accuracy(self) -> float:
        """Fraction of tokens that the model held most probable; NaN if there was nothing to predict."""
        return self.correct / self.tokens if self.tokens else math.nan


def perplexity(nats_per_token: float) -> float:
    """Return exp(nats per token); infinite if that overflows a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def bits_per(units: int, nats: float) -> float:
    """Return the bits per character or byte of a text of `units` characters or bytes; comparable between tokenizers."""
    return nats / LN_2 / units if units else math.nan
