"""What may stand in a blank, by what stands on both sides of it.

Shapes: V vocabulary, R candidates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.data.text.normalise import normalise
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Direction, align
from lmtrain.model.states import select

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
    """The best fillings of a text's blank, best first.

    One token: from the state before the blank and the one behind it together, which were trained for this; exact over
    the vocabulary. Up to several tokens: beam search from both sides proposes fillings; each is ranked by the mean of
    the two directions' log-probabilities of the whole text, and probabilities are shares among the proposed ones.

    Args:
        model: of two directions, in evaluation mode.
        text: holds one blank `____`.
        tokens: in a filling at most.

    Raises:
        ConfigError: no blank or several, or a model of one direction.
        DataError: kind ids, and a text that is not ids.
    """
    if not model.bidirectional:
        raise ConfigError("this run reads in one direction; to fill a blank takes two (model.bidirectional: true)")
    blanks = list(BLANK.finditer(text))
    if len(blanks) != 1:
        found = f"{len(blanks)} blanks" if blanks else "no blank"
        raise ConfigError(f"the text holds {found}; mark one with ____")
    before, behind = text[: blanks[0].start()], text[blanks[0].end() :]
    pieces = tokenizer.kind in ("bpe", "unigram", "file")
    trimmed = before.rstrip(" ") if pieces else before  # a piece has the white space before it in itself
    left, right = tokenizer.encode(normalise(trimmed)), tokenizer.encode(normalise(behind))
    if tokens == 1:
        best = _one_token(model, tokenizer, left, right, top)
    else:
        best = _several_tokens(model, tokenizer, left, right, top, tokens)
    fillings = []
    for ids, probability in best:
        inner = tokenizer.decode(ids)
        inner = inner.removeprefix(" ") if trimmed != before else inner
        fillings.append(Filling(inner, probability, before + inner + behind))
    return fillings


def _never(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are no text."""
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    return special if tokenizer.unk_id is None else [*special, tokenizer.unk_id]


def _one_token(
    model: LanguageModel, tokenizer: Tokenizer, left: list[int], right: list[int], top: int
) -> list[tuple[list[int], float]]:
    # whatever stands in the blank itself: neither state has seen it
    row = [tokenizer.bos_id, *left, tokenizer.eos_id, *right, tokenizer.eos_id]
    batch = make_batch([row], tokenizer.pad_id)
    states = model.read(batch.tokens.to(model.embedding.weight.device), batch.lengths).events["fill"].states
    log_probabilities = model.log_probabilities("fill", states[len(left) : len(left) + 1], None)[0]  # (V,)
    log_probabilities[_never(tokenizer)] = -torch.inf
    probabilities = log_probabilities.double().softmax(0)
    best, tokens = probabilities.topk(min(top, len(probabilities)))
    found = zip(tokens.tolist(), best.tolist(), strict=True)
    return [([token], probability) for token, probability in found if probability > 0]


def _several_tokens(
    model: LanguageModel, tokenizer: Tokenizer, left: list[int], right: list[int], top: int, tokens: int
) -> list[tuple[list[int], float]]:
    width = max(LEAST_BEAM, 4 * top)
    proposed: dict[tuple[int, ...], None] = {}  # in the order in which they were found
    sides: list[tuple[Direction, list[int]]] = [("forward", left), ("backward", right)]
    for direction, prompt in sides:
        for ids in _propose(model, PromptCodec(tokenizer, direction=direction), prompt, width, tokens):
            proposed[ids] = None
    rows = [[tokenizer.bos_id, *left, *ids, *right, tokenizer.eos_id] for ids in proposed]
    log_probabilities = np.concatenate(
        [
            _of_rows(model, tokenizer, rows[start : start + CANDIDATES_AT_ONCE])
            for start in range(0, len(rows), CANDIDATES_AT_ONCE)
        ]
    )
    shares = np.exp(log_probabilities - log_probabilities.max())
    shares /= shares.sum()
    candidates = list(proposed)
    best = np.argsort(-shares, kind="stable")[:top]
    return [(list(candidates[place]), float(shares[place])) for place in best]


def _propose(
    model: LanguageModel, script: PromptCodec, side: Sequence[int], width: int, tokens: int
) -> list[tuple[int, ...]]:
    """Fillings of one token to several that go on well from one side, in the order of the text."""
    tokenizer, device = script.tokenizer, model.embedding.weight.device
    backward = script.direction == "backward"
    prompt = [script.start, *(reversed(side) if backward else side)]
    never = torch.tensor(_never(tokenizer), device=device)
    logits, state = model.read_prompts(
        torch.tensor(prompt, device=device).unsqueeze(1), torch.tensor([len(prompt)]), script.direction
    )
    running: list[tuple[int, ...]] = [()]
    totals = torch.zeros(1, 1, device=device)
    found = []
    for length in range(1, tokens + 1):
        scores = totals + logits.log_softmax(-1).index_fill(1, never, -torch.inf)  # (R, V)
        vocab_size = scores.shape[1]
        best, places = scores.flatten().topk(min(width, scores.numel() - len(running) * len(never)))
        parents, chosen = places // vocab_size, places % vocab_size
        running = [
            (token, *running[parent]) if backward else (*running[parent], token)
            for parent, token in zip(parents.tolist(), chosen.tolist(), strict=True)
        ]
        found += running
        if length < tokens:
            logits, state = model(chosen.unsqueeze(0), select(state, parents), script.direction)
            logits, totals = logits.squeeze(0), best.unsqueeze(1)
    return found


def _of_rows(model: LanguageModel, tokenizer: Tokenizer, rows: list[list[int]]) -> np.ndarray:
    """Log-probability of each row, the mean of both directions, (R,)."""
    batch = make_batch(rows, tokenizer.pad_id)
    events = model.read(batch.tokens.to(model.embedding.weight.device), batch.lengths).events
    row = align(batch.lengths).rows.row.numpy()
    directions: tuple[Direction, ...] = ("forward", "backward")
    nats = sum(model.nats(direction, events[direction]).double().cpu().numpy() for direction in directions) / 2
    return -np.bincount(batch.order.numpy()[row], weights=nats, minlength=len(rows))
