"""Draws the next token at random from the probable ones, with the settings of `Sampling`.

Shapes: B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lmtrain.inference.options import Sampling


def token_probabilities(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """Compute the distribution that the next token is drawn from: (B, V) float64 on CPU, each row sums to 1.

    Args:
        logits: (B, V), -inf for tokens that never follow.
        seen: (B, V) bool, marks the tokens that stand in a row's text; needed only with a repetition penalty.
    """
    logits = penalise(logits, seen, sampling.repetition_penalty).double().cpu()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double()
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k is not None and sampling.top_k < probabilities.shape[1]:
        best, tokens = probabilities.topk(sampling.top_k)
        probabilities = _normalise(torch.zeros_like(probabilities).scatter_(1, tokens, best))
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(1) - ordered >= sampling.top_p] = 0  # more probable tokens hold top_p already
        probabilities = _normalise(torch.zeros_like(probabilities).scatter_(1, tokens, ordered))
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(1, keepdim=True)
        probabilities = _normalise(probabilities.where(probabilities >= least, 0.0))
    return probabilities


def _normalise(probabilities: Tensor) -> Tensor:
    return probabilities / probabilities.sum(1, keepdim=True)


def penalise(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Apply the repetition penalty to the logits (B, V) of the tokens that are marked in `seen` (B, V) bool."""
    if seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def random_generator(seed: int, prompt: Sequence[int], number: int) -> np.random.Generator:
    """Return the random generator of text `number` of a prompt; it does not depend on the rest of the batch."""
    digest = hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest()
    return np.random.default_rng([seed, number, *np.frombuffer(digest, np.uint32)])


def draw_tokens(probabilities: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
    """Draw a token (B,) for each row of probabilities (B, V), with one number of the row's own generator."""
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    numbers = torch.tensor([generator.random() for generator in generators], dtype=torch.float64).unsqueeze(1)
    wanted = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))  # below the total, if rounded
    # the first token whose cumulative sum exceeds the number: never a token of probability 0
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
