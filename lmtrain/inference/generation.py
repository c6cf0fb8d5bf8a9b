"""Greedy text, for a batch of ragged prompts, each row until its own end token.

Shapes: B prompts that still run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain.data.batching import make_batch
from lmtrain.data.tokenizer import Tokenizer, normalise
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import argmax
from lmtrain.model.states import State, select

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt."""

    prompt: str
    completion: str
    text: str  # both
    finished: bool  # it met its end token
    log_probability: float  # of the completion given the prompt, its end token included, natural logarithm


@torch.inference_mode()
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int, stream: bool = False
) -> list[Generation]:
    """Continue each prompt with its most probable next token, until the end token or `max_tokens`.

    Args:
        prompts: texts; an empty one starts from `<bos>` alone.
        stream: the model has learnt one long text: it starts from `<eos>`, an end token is a newline, and the text goes
            on behind it until `max_tokens`.

    Raises:
        DataError: kind ids, and a prompt that is not ids.
    """
    device = model.embedding.weight.device
    results = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        texts = prompts[start : start + ROWS_AT_ONCE]
        encoded = [_encode(tokenizer, text, stream) for text in texts]
        written = _Greedy(model, tokenizer, len(encoded), stream).run(encoded, max_tokens, device)
        for text, prompt, (ids, finished, log_probability) in zip(texts, encoded, written, strict=True):
            completion = _completion(tokenizer, prompt, ids)
            if text[-1:].isspace() and tokenizer.separator == " ":
                completion = completion.removeprefix(" ")
            results.append(Generation(text, completion, text + completion, finished, log_probability))
    return results


def _encode(tokenizer: Tokenizer, text: str, stream: bool) -> list[int]:
    """What the model reads first, and the ids of a prompt; in a stream a newline is an end token."""
    lines = normalise(text).split("\n") if stream else [normalise(text)]
    first, *lines_after = map(tokenizer.encode, lines)
    start = tokenizer.eos_id if stream else tokenizer.bos_id
    return [start, *first, *(token for line in lines_after for token in (tokenizer.eos_id, *line))]


def _completion(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of ids behind a prompt, with the white space that belongs between the two."""
    before, whole = _decode(tokenizer, prompt[1:]), _decode(tokenizer, prompt[1:] + ids)
    return whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, an end token among them being a newline."""
    lines: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eos_id:
            lines.append([])
        else:
            lines[-1].append(token)
    return "\n".join(map(tokenizer.decode, lines))


class _Greedy:
    """One batch of prompts on its way; rows that have met their end token leave it."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, count: int, stream: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end = None if stream else tokenizer.eos_id  # a stream has none
        self.written: list[list[int]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.log_probability = [0.0] * count
        # these never follow anything
        self.never = torch.tensor([tokenizer.pad_id, tokenizer.bos_id], device=model.embedding.weight.device)

    def run(
        self, prompts: list[list[int]], max_tokens: int, device: torch.device
    ) -> list[tuple[list[int], bool, float]]:
        batch = make_batch(prompts, self.tokenizer.pad_id)
        running = batch.order.tolist()  # the caller's row of each row that still runs
        logits, state = self.model.read_prompts(batch.tokens.to(device), batch.lengths)
        for step in range(max_tokens):
            tokens, running, state = self._take(logits, running, state)
            if not running or step == max_tokens - 1:
                break
            logits, state = self.model(tokens.unsqueeze(0), state)
            logits = logits.squeeze(0)
        return list(zip(self.written, self.finished, self.log_probability, strict=True))

    def _take(self, logits: Tensor, running: list[int], state: State) -> tuple[Tensor, list[int], State]:
        """Note each row's best token (B,) and drop the rows that end with it."""
        log_probabilities = logits.log_softmax(-1).index_fill_(1, self.never, -torch.inf)  # (B, V)
        tokens = argmax(log_probabilities)
        best = log_probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
        going_on = []  # places among the rows that run
        for place, (row, token, log_probability) in enumerate(
            zip(running, tokens.tolist(), best.tolist(), strict=True)
        ):
            self.log_probability[row] += log_probability
            if token == self.end:
                self.finished[row] = True
            else:
                self.written[row].append(token)
                going_on.append(place)
        if len(going_on) == len(running):
            return tokens, running, state
        places = torch.tensor(going_on, dtype=torch.int64, device=tokens.device)
        return tokens[places], [running[place] for place in going_on], select(state, places)
