"""Draws the next token at random from the probable ones, with the settings of `Sampling`.

Shapes: B rows, K candidates of each, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmtrain.inference.options import Sampling
from lmtrain.model.output import argmax

COLDEST = 1e-200  # lower temperatures are raised to this, so that logits divided by them stay finite


class Candidates(NamedTuple):
    """The tokens that may come next, with the probability that each is drawn."""

    tokens: Tensor  # (B, K) int64 on CPU, ascending in each row
    probabilities: Tensor  # (B, K) float64 on CPU, each row sums to 1; 0 for what the settings leave out


def choose_candidates(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Candidates:
    """Compute the distribution from which the next token is drawn.

    Args:
        logits: (B, V) float32, -inf for tokens that never follow.
        seen: (B, V) bool, marks the tokens that stand in a row's text; needed only with a repetition penalty.
    """
    logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens = argmax(logits).unsqueeze(1).cpu()
        return Candidates(tokens, torch.ones(tokens.shape, dtype=torch.float64))
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        tokens = logits.topk(sampling.top_k).indices.sort(1).values
        logits, tokens = to_cpu(logits.gather(1, tokens), tokens)
    else:
        logits, tokens = logits.cpu(), torch.arange(logits.shape[1]).expand(logits.shape)
    # float64 only on the CPU: Apple's GPUs have none
    probabilities = (logits.double() / max(sampling.temperature, COLDEST)).softmax(-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(1) - ordered >= sampling.top_p] = 0  # more probable tokens hold top_p already
        probabilities = _normalise(torch.zeros_like(probabilities).scatter_(1, places, ordered))
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(1, keepdim=True)
        probabilities = _normalise(probabilities.where(probabilities >= least, 0.0))
    return Candidates(tokens, probabilities)


def to_cpu(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Bring float32 values and int64 tokens of one shape to the CPU; this waits for the device once."""
    if values.device.type == "cpu":
        return values, tokens
    packed = torch.stack([values.view(torch.int32), tokens.int()]).cpu()
    return packed[0].view(torch.float32), packed[1].long()


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


def draw_tokens(candidates: Candidates, generators: Sequence[np.random.Generator]) -> Tensor:
    """Draw a token (B,) int64 for each row of candidates, with one number of the row's own generator."""
    cumulative = candidates.probabilities.cumsum(1)
    total = cumulative[:, -1:]
    numbers = torch.tensor([generator.random() for generator in generators], dtype=torch.float64).unsqueeze(1)
    wanted = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))  # below the total, if rounded
    # the first token whose cumulative sum exceeds the number: never a token of probability 0
    return candidates.tokens.gather(1, torch.searchsorted(cumulative, wanted, right=True)).squeeze(1)
