"""Beam search: the most probable texts that a bounded number of hypotheses leads to.

Shapes: R hypotheses that run, over all prompts; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.data.batches.rows import make_batch
from lmtrain.errors import ConfigError
from lmtrain.inference.generation import ROWS_AT_ONCE, Generation, PartialText, to_generation
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import select

WIDEST = 1 << 16  # beams of one prompt


@dataclass(frozen=True)
class Beams:
    """How wide a search is, and by what its texts are ranked.

    Raises:
        ConfigError: a width below 1, a negative penalty.
    """

    width: int
    """Hypotheses that are kept of each prompt; one that has met its end takes its place with it. 1 is greedy."""
    length_penalty: float = 0.0
    """Texts are ranked by log-probability / tokens ** length_penalty: 0 by probability, 1 by that of a token on
    average (Wu et al. 2016, https://arxiv.org/abs/1609.08144, have a like one)."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= WIDEST:
            raise ConfigError(f"beams: should be from 1 to {WIDEST}, not {self.width}")
        if not 0 <= self.length_penalty < math.inf:
            raise ConfigError(f"length_penalty: should be 0 or greater and finite, not {self.length_penalty}")

    def score(self, row: PartialText) -> float:
        """By what a text is ranked, the greatest first."""
        length = float(max(1, len(row.log_probabilities)))
        return sum(row.log_probabilities) / math.pow(length, self.length_penalty)


class _Hypothesis(NamedTuple):
    prompt: int
    written: PartialText
    log_probability: float  # of all that is written


@torch.inference_mode()
def beam_search(
    model: LanguageModel, script: PromptCodec, prompts: Sequence[str], *, max_tokens: int, beams: Beams, count: int = 1
) -> list[Generation]:
    """The best texts to each prompt, `count` of them one after the other, best first.

    A prompt's search ends once as many hypotheses as the beam is wide have met their end, or at `max_tokens`; what runs
    then is ranked with what has ended.

    Raises:
        DataError: kind ids, and a prompt that is not ids.
    """
    results = []
    prompts_at_once = max(1, ROWS_AT_ONCE // beams.width)
    for start in range(0, len(prompts), prompts_at_once):
        texts = prompts[start : start + prompts_at_once]
        found = _search_batch(model, script, [script.encode(text) for text in texts], max_tokens, beams)
        for text, rows in zip(texts, found, strict=True):
            ranked = sorted(rows, key=beams.score, reverse=True)  # equal ones stay in the order they were found in
            results += [to_generation(script, text, row) for row in ranked[:count]]
    return results


def _search_batch(
    model: LanguageModel, script: PromptCodec, prompts: list[list[int]], max_tokens: int, beams: Beams
) -> list[list[PartialText]]:
    device = model.embedding.weight.device
    never = torch.tensor(script.never, device=device)
    ended: list[list[PartialText]] = [[] for _ in prompts]
    batch = make_batch(prompts, script.tokenizer.pad_id)
    running = [_Hypothesis(place, PartialText(prompts[place]), 0.0) for place in batch.order.tolist()]
    logits, state = model.read_prompts(batch.tokens.to(device), batch.lengths, script.direction)
    for step in range(max_tokens):
        log_probabilities = logits.log_softmax(-1).index_fill_(1, never, -torch.inf)  # (R, V)
        parents, running = _grow(log_probabilities, running, ended, script.end, beams.width)
        if not running or step == max_tokens - 1:
            break
        state = select(state, torch.tensor(parents, device=device))
        tokens = torch.tensor([hypothesis.written.ids[-1] for hypothesis in running], device=device)
        logits, state = model(tokens.unsqueeze(0), state, script.direction)
        logits = logits.squeeze(0)
    for hypothesis in running:
        ended[hypothesis.prompt].append(hypothesis.written)
    return ended


def _grow(
    log_probabilities: Tensor,
    running: list[_Hypothesis],
    ended: list[list[PartialText]],
    end: int | None,
    width: int,
) -> tuple[list[int], list[_Hypothesis]]:
    """The best hypotheses one token longer, of each prompt as many as have not ended yet, and the place each one's
    parent had; those that end now go to `ended`."""
    best, tokens = log_probabilities.topk(min(width, log_probabilities.shape[1]), dim=1)
    candidates: dict[int, list[tuple[float, int, int, float]]] = {}
    for place, (hypothesis, values, ids) in enumerate(zip(running, best.tolist(), tokens.tolist(), strict=True)):
        own = candidates.setdefault(hypothesis.prompt, [])
        own += [
            (hypothesis.log_probability + value, place, token, value)
            for value, token in zip(values, ids, strict=True)
            if value > -torch.inf
        ]
    parents, grown = [], []
    for prompt, own in candidates.items():
        own.sort(key=lambda candidate: -candidate[0])
        for total, place, token, value in own[: width - len(ended[prompt])]:
            parent = running[place].written
            written = PartialText(parent.prompt, parent.ids, [*parent.log_probabilities, value])
            if token == end:
                written.finished = True
                ended[prompt].append(written)
                continue
            written.ids = [*parent.ids, token]
            parents.append(place)
            grown.append(_Hypothesis(prompt, written, total))
    return parents, grown
