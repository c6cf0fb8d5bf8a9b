"""Finds what may stand in a blank, given the text on both sides of it.

Shapes: R candidates, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtrain.data.batches.rows import make_batch
from lmtrain.data.text.normalise import normalise
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.scoring import LOGITS_AT_ONCE
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Direction, align
from lmtrain.model.states import join, select

BLANK = re.compile("_{4,}")
LEAST_BEAM = 64
CANDIDATES_AT_ONCE = 256


@dataclass(frozen=True)
class Filling:
    """One way to fill a blank."""

    text: str  # what stands in the blank
    probability: float
    filled: str  # the whole text


@torch.inference_mode()
def fill_blank(
    model: LanguageModel, tokenizer: Tokenizer, text: str, *, top: int = 5, tokens: int = 1
) -> list[Filling]:
    """Find at most `top` fillings of the one blank `____` of a text, of at most `tokens` tokens, best first.

    A filling of one token is predicted from the state before the blank and the state after it together, as in
    training; its probability is exact over the vocabulary. For fillings of up to several tokens a beam search from
    each side proposes candidates. These are ranked by the mean of the two directions' log-probabilities of the whole
    text; their probabilities sum to 1 over the proposed candidates.
    """
    if not model.bidirectional:
        raise ConfigError("this run reads in one direction; to fill a blank takes two (model.bidirectional: true)")
    blanks = list(BLANK.finditer(text))
    if len(blanks) != 1:
        raise ConfigError(f"the text holds {len(blanks) or 'no'} blank{'s' * bool(blanks)}; mark one with ____")
    before, after = text[: blanks[0].start()], text[blanks[0].end() :]
    pieces = tokenizer.kind in ("bpe", "unigram", "file")
    trimmed = before.rstrip(" ") if pieces else before  # a piece contains the white space before it
    left, right = tokenizer.encode(normalise(trimmed)), tokenizer.encode(normalise(after))
    if tokens == 1:
        best = _fill_one_token(model, tokenizer, left, right, top)
    else:
        best = _fill_several_tokens(model, tokenizer, left, right, top, tokens)
    fillings = []
    for ids, probability in best:
        inner = tokenizer.decode(ids).removeprefix("" if trimmed == before else " ")
        fillings.append(Filling(inner, probability, before + inner + after))
    return fillings


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    """List the tokens that stand for no text, and so never fill a blank."""
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    return special if tokenizer.unk_id is None else [*special, tokenizer.unk_id]


def _fill_one_token(
    model: LanguageModel, tokenizer: Tokenizer, left: list[int], right: list[int], top: int
) -> list[tuple[list[int], float]]:
    # eos stands for the blank, as any token could: neither of the two states has read it
    row = [tokenizer.bos_id, *left, tokenizer.eos_id, *right, tokenizer.eos_id]
    batch = make_batch([row], tokenizer.pad_id)
    states = model.read(batch.tokens, batch.lengths).events["fill"].states
    log_probabilities = model.log_probabilities("fill", states[len(left) : len(left) + 1], None)[0]  # (V,)
    log_probabilities[_special_ids(tokenizer)] = -torch.inf
    probabilities = log_probabilities.cpu().double().softmax(0)
    best, tokens = probabilities.topk(min(top, len(probabilities)))
    ranked = zip(tokens.tolist(), best.tolist(), strict=True)
    return [([token], probability) for token, probability in ranked if probability > 0]


def _fill_several_tokens(
    model: LanguageModel, tokenizer: Tokenizer, left: list[int], right: list[int], top: int, tokens: int
) -> list[tuple[list[int], float]]:
    width = max(LEAST_BEAM, 4 * top)
    sides: list[tuple[Direction, list[int]]] = [("forward", left), ("backward", right)]
    proposed: dict[tuple[int, ...], None] = {}  # each once, in the order in which they were proposed
    for direction, side in sides:
        codec = PromptCodec(tokenizer, direction=direction)
        proposed |= dict.fromkeys(_propose(model, codec, side, width, tokens))
    rows = [[tokenizer.bos_id, *left, *ids, *right, tokenizer.eos_id] for ids in proposed]
    parts = [rows[start : start + CANDIDATES_AT_ONCE] for start in range(0, len(rows), CANDIDATES_AT_ONCE)]
    log_probabilities = np.concatenate([_row_log_probabilities(model, tokenizer, part) for part in parts])
    probabilities = np.exp(log_probabilities - log_probabilities.max())
    probabilities /= probabilities.sum()
    candidates = list(proposed)
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [(list(candidates[index]), float(probabilities[index])) for index in best]


def _propose(
    model: LanguageModel, codec: PromptCodec, side: Sequence[int], width: int, tokens: int
) -> list[tuple[int, ...]]:
    """Propose fillings of 1 to `tokens` tokens that are probable given one side; ids in the order of the text."""
    tokenizer, device = codec.tokenizer, model.embedding.weight.device
    backward = codec.direction == "backward"
    prompt = [codec.start, *(reversed(side) if backward else side)]
    excluded = torch.tensor(_special_ids(tokenizer), device=device)
    logits, state = model.read_prompts(
        torch.tensor(prompt, device=device).unsqueeze(1), torch.tensor([len(prompt)]), codec.direction
    )
    vocab_size = logits.shape[1]

    def extend(logits: Tensor, totals: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Extend R texts by one token. Return the best log-probabilities (width,), and for each the index: number of
        the text * V + token. The first text has number `start`; `totals` (R, 1) are the texts' log-probabilities."""
        scores = totals + logits.log_softmax(-1).index_fill(1, excluded, -torch.inf)  # (R, V)
        best, indices = scores.flatten().topk(min(width, scores.numel() - len(scores) * len(excluded)))
        return best, indices + start * vocab_size

    running: list[tuple[int, ...]] = [()]
    extended = [extend(logits, torch.zeros(1, 1, device=device), 0)]
    rows_at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    proposed = []
    for length in range(1, tokens + 1):
        best, indices = (torch.cat(parts) for parts in zip(*extended, strict=True))
        if len(extended) > 1:
            best, order = best.topk(min(width, len(best)))
            indices = indices[order]
        extensions = [divmod(index, vocab_size) for index in indices.tolist()]
        running = [(token, *running[parent]) if backward else (*running[parent], token) for parent, token in extensions]
        proposed += running
        if length < tokens:
            extended, states = [], []
            for start in range(0, len(running), rows_at_once):
                block = indices[start : start + rows_at_once]
                before = select(state, block // vocab_size)
                logits, after = model((block % vocab_size).unsqueeze(0), before, codec.direction)
                extended.append(extend(logits.squeeze(0), best[start : start + rows_at_once].unsqueeze(1), start))
                states.append(after)
            state = join(states)
    return proposed


def _row_log_probabilities(model: LanguageModel, tokenizer: Tokenizer, rows: list[list[int]]) -> np.ndarray:
    """Compute the log-probability (R,) of each row, the mean of both directions."""
    batch = make_batch(rows, tokenizer.pad_id)
    events = model.read(batch.tokens, batch.lengths).events
    row = align(batch.lengths).rows.row.numpy()
    directions: tuple[Direction, ...] = ("forward", "backward")
    nats = sum(model.nats(direction, events[direction]).cpu().double().numpy() for direction in directions) / 2
    return -np.bincount(batch.order.numpy()[row], weights=nats, minlength=len(rows))
