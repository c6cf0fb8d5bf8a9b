"""Beam search finds probable texts by extending a bounded number of hypotheses.

Shapes: B rows of a block, R hypotheses of all prompts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import make_batch
from lmtrain.inference.generation import Generation, PartialText, rows_at_once, to_generation
from lmtrain.inference.options import Beams
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.sampling import to_cpu
from lmtrain.inference.scoring import LOGITS_AT_ONCE
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import ModelState, join, select

Floats = NDArray[np.float64]


class _Hypotheses(NamedTuple):
    """Texts of equal length, each of which extends a text of the step before by one token."""

    prompts: Ints  # (R,) place of the prompt in the batch, ascending
    parents: Ints  # (R,) index of the text that is extended, in the step before
    tokens: Ints  # (R,) the token that extends it
    values: Floats  # (R,) log-probability of this token
    totals: Floats  # (R,) log-probability of the whole text

    def take(self, which: NDArray[Any]) -> _Hypotheses:
        return _Hypotheses(*(part[which] for part in self))


@torch.inference_mode()
def beam_search(
    model: LanguageModel, codec: PromptCodec, prompts: Sequence[str], *, max_tokens: int, beams: Beams, count: int = 1
) -> list[Generation]:
    """Find the best `count` texts to each prompt; the texts of one prompt follow each other, best first.

    A prompt's search ends once `beams.width` hypotheses have reached their end, or at `max_tokens`; the hypotheses
    that still run then are ranked with those that have ended.
    """
    results = []
    prompts_at_once = max(1, rows_at_once(model) // beams.width)
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
    """Search from a batch of prompts; returns the texts found for each prompt, ended ones first."""
    batch, device = make_batch(prompts, codec.tokenizer.pad_id), model.embedding.weight.device
    ordered_prompts = [prompts[prompt] for prompt in batch.order.tolist()]  # in the order of the batch
    found: list[list[PartialText]] = [[] for _ in prompts]
    room = np.full(len(prompts), beams.width)  # how many texts of each prompt may still run or end
    first, zeros = np.arange(len(prompts)), np.zeros(len(prompts))
    steps = [_Hypotheses(first, first, first, zeros, zeros)]
    logits, state = model.read_prompts(batch.tokens.to(device), batch.lengths, codec.direction)
    candidates = _extend(codec, logits, steps[0], 0, beams.width)
    for step in range(max_tokens):
        # the sort is stable: equally probable texts stay in the order of their parents
        best = candidates.take(np.lexsort((-candidates.totals, candidates.prompts)))
        rank = np.arange(len(best.prompts)) - np.searchsorted(best.prompts, best.prompts)
        best = best.take(rank < room[best.prompts])
        ends = best.tokens == (-1 if codec.end is None else codec.end)
        for index in np.flatnonzero(ends).tolist():
            text = _rebuild(ordered_prompts, steps, best.parents[index])
            text.log_probabilities.append(float(best.values[index]))
            text.finished = True
            found[best.prompts[index]].append(text)
        room -= np.bincount(best.prompts[ends], minlength=len(prompts))
        steps.append(best.take(~ends))
        if not len(steps[-1].tokens) or step == max_tokens - 1:
            break
        candidates, state = _step(model, codec, steps[-1], state, beams.width)
    for index, prompt in enumerate(steps[-1].prompts.tolist()):
        found[prompt].append(_rebuild(ordered_prompts, steps, index))
    return [found[place] for place in np.argsort(batch.order.numpy())]


def _rebuild(prompts: list[list[int]], steps: list[_Hypotheses], index: int) -> PartialText:
    """Return the text of a hypothesis of the last step, by going back from parent to parent."""
    text = PartialText(prompts[steps[-1].prompts[index]])
    for step in reversed(steps[1:]):
        text.ids.append(int(step.tokens[index]))
        text.log_probabilities.append(float(step.values[index]))
        index = step.parents[index]
    text.ids.reverse()
    text.log_probabilities.reverse()
    return text


def _step(
    model: LanguageModel, codec: PromptCodec, running: _Hypotheses, state: ModelState, width: int
) -> tuple[_Hypotheses, ModelState]:
    """Read the last token of each running text; returns the texts that may come next, and the new state.

    The texts are read in blocks, so that memory for logits is bounded whatever the width and the vocabulary.
    """
    device, size = model.embedding.weight.device, model.vocab_size
    tokens, parents = (torch.from_numpy(part).to(device) for part in (running.tokens, running.parents))
    at_once = max(1, LOGITS_AT_ONCE // max(size, 8 * min(width, size)))
    candidates, states = list[_Hypotheses](), []
    for start in range(0, len(tokens), at_once):
        block = slice(start, start + at_once)
        logits, after = model(tokens[block].unsqueeze(0), select(state, parents[block]), codec.direction)
        candidates.append(_extend(codec, logits.squeeze(0), running, start, width))
        states.append(after)
        if running.prompts[0] == running.prompts[-1]:
            whole = _Hypotheses(*map(np.concatenate, zip(*candidates, strict=True)))
            candidates = [whole.take(_greatest(whole.totals, width))]
    return _Hypotheses(*map(np.concatenate, zip(*candidates, strict=True))), join(states)


def _extend(codec: PromptCodec, logits: Tensor, running: _Hypotheses, start: int, width: int) -> _Hypotheses:
    """Extend B running texts, from number `start` on, by the best tokens according to their logits (B, V)."""
    excluded = torch.tensor(codec.excluded_ids, device=logits.device)
    log_probabilities = logits.log_softmax(-1).index_fill_(1, excluded, -torch.inf)  # (B, V)
    best = log_probabilities.topk(min(width, logits.shape[1]), dim=1)
    values, tokens = (part.numpy() for part in to_cpu(*best))
    rows, ranks = np.nonzero(values > -np.inf)
    parents, token_values = start + rows, values[rows, ranks].astype(np.float64)
    totals = running.totals[parents] + token_values
    return _Hypotheses(running.prompts[parents], parents, tokens[rows, ranks], token_values, totals)


def _greatest(totals: Floats, count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` greatest totals, ascending; of equal ones the first."""
    if len(totals) <= count:
        return np.arange(len(totals))
    least = np.partition(totals, -count)[-count]
    above, equal = np.flatnonzero(totals > least), np.flatnonzero(totals == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
