"""The output layer: from a state to the probabilities of the vocabulary's tokens.

Shapes: N events, P output size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FullOutput(nn.Linear):
    """One logit for each of the V tokens; the weight (V, P) may be the embedding's."""

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target (N,) given its state (N, P), in nats, float32."""
        return F.cross_entropy(self(states).float(), targets, reduction="none")

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Natural log-probabilities (N, V) of every token, float32."""
        return F.log_softmax(self(states).float(), -1)


class AdaptiveOutput(nn.Module):
    """Adaptive softmax: frequent tokens in a short list, rare ones in clusters with smaller weights.

    Grave et al. 2017, https://arxiv.org/abs/1609.04309, as `torch.nn.AdaptiveLogSoftmaxWithLoss`; it takes ids
    sorted by falling frequency, as lmtrain's char and word vocabularies are.
    """

    def __init__(self, output_size: int, vocab_size: int) -> None:
        super().__init__()
        cutoffs = sorted({max(1, vocab_size // 16), max(2, vocab_size // 4)})
        div_value = (
            4.0 if output_size >= 16 else 1.0
        )  # the last cluster's states have output_size / div_value**2 values
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(output_size, vocab_size, cutoffs, div_value, head_bias=True)

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target (N,) given its state (N, P), in nats, float32."""
        with torch.autocast(states.device.type, enabled=False):
            result: Tensor = self.clusters(self._cast(states), targets).output
        return -result

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Natural log-probabilities (N, V) of every token, float32."""
        with torch.autocast(states.device.type, enabled=False):
            result: Tensor = self.clusters.log_prob(self._cast(states))
        return result

    def _cast(self, states: Tensor) -> Tensor:
        return states.to(self.clusters.head.weight.dtype)  # out of autocast
