"""Beam search finds probable texts by extending a bounded number of hypotheses.

Shapes: R running hypotheses of all prompts, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.data.batches.rows import make_batch
from lmtrain.inference.generation import ROWS_AT_ONCE, Generation, PartialText, to_generation
from lmtrain.inference.options import Beams
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import select


class _Hypothesis(NamedTuple):
    prompt: int  # index of the prompt
    text: PartialText
    log_probability: float  # log-probability of the whole text


@torch.inference_mode()
def beam_search(
    model: LanguageModel, codec: PromptCodec, prompts: Sequence[str], *, max_tokens: int, beams: Beams, count: int = 1
) -> list[Generation]:
    """Find the best `count` texts to each prompt; the texts of one prompt follow each other, best first.

    A prompt's search ends once `beams.width` hypotheses have reached their end, or at `max_tokens`; the hypotheses
    that still run then are ranked with those that have ended.
    """
    results = []
    prompts_at_once = max(1, ROWS_AT_ONCE // beams.width)
    for start in range(0, len(prompts), prompts_at_once):
        part = prompts[start : start + prompts_at_once]
        texts_of_each = _search_batch(model, codec, [codec.encode(prompt) for prompt in part], max_tokens, beams)
        for prompt, texts in zip(part, texts_of_each, strict=True):
            # the sort is stable: texts of equal rank stay in the order in which they ended
            ranked = sorted(texts, key=lambda text: _rank(text, beams.length_penalty), reverse=True)
            results += [to_generation(codec, prompt, text) for text in ranked[:count]]
    return results


def _rank(text: PartialText, length_penalty: float) -> float:
    """Return the value by which texts are ranked, greatest first: see `Beams.length_penalty`."""
    length = float(max(1, len(text.log_probabilities)))
    return sum(text.log_probabilities) / math.pow(length, length_penalty)


def _search_batch(
    model: LanguageModel, codec: PromptCodec, prompts: list[list[int]], max_tokens: int, beams: Beams
) -> list[list[PartialText]]:
    device = model.embedding.weight.device
    excluded = torch.tensor(codec.excluded_ids, device=device)
    ended: list[list[PartialText]] = [[] for _ in prompts]
    batch = make_batch(prompts, codec.tokenizer.pad_id)
    running = [_Hypothesis(prompt, PartialText(prompts[prompt]), 0.0) for prompt in batch.order.tolist()]
    logits, state = model.read_prompts(batch.tokens.to(device), batch.lengths, codec.direction)
    for step in range(max_tokens):
        log_probabilities = logits.log_softmax(-1).index_fill_(1, excluded, -torch.inf)  # (R, V)
        parents, running = _extend(log_probabilities, running, ended, codec.end, beams.width)
        if not running or step == max_tokens - 1:
            break
        state = select(state, torch.tensor(parents, device=device))
        tokens = torch.tensor([hypothesis.text.ids[-1] for hypothesis in running], device=device)
        logits, state = model(tokens.unsqueeze(0), state, codec.direction)
        logits = logits.squeeze(0)
    for hypothesis in running:
        ended[hypothesis.prompt].append(hypothesis.text)
    return ended


def _extend(
    scores: Tensor, running: list[_Hypothesis], ended: list[list[PartialText]], end: int | None, width: int
) -> tuple[list[int], list[_Hypothesis]]:
    """Extend the hypotheses by one token, whose log-probabilities are `scores` (R, V), and keep each prompt's best.

    Those that take the token `end` move to `ended[prompt]`; at most `width` hypotheses of a prompt run or have ended.
    Returns the index in `running` of each remaining hypothesis's parent, and the remaining hypotheses.
    """
    best, tokens = scores.topk(min(width, scores.shape[1]), dim=1)
    candidates: dict[int, list[tuple[float, int, int, float]]] = {}  # prompt -> (total, parent, token, value)
    for parent, (hypothesis, values, ids) in enumerate(zip(running, best.tolist(), tokens.tolist(), strict=True)):
        candidates.setdefault(hypothesis.prompt, []).extend(
            (hypothesis.log_probability + value, parent, token, value)
            for value, token in zip(values, ids, strict=True)
            if value > -torch.inf
        )
    parents, extended = [], []
    for prompt, of_prompt in candidates.items():
        of_prompt.sort(key=lambda candidate: -candidate[0])
        for total, parent, token, value in of_prompt[: width - len(ended[prompt])]:
            before = running[parent].text
            text = PartialText(before.prompt, before.ids, [*before.log_probabilities, value])
            if token == end:
                text.finished = True
                ended[prompt].append(text)
                continue
            text.ids = [*before.ids, token]
            parents.append(parent)
            extended.append(_Hypothesis(prompt, text, total))
    return parents, extended
