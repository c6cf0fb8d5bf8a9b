"""Text that a model writes: greedy or drawn at random, for a batch of ragged prompts, each row until its own end.

Shapes: B rows that still run, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmtrain.data.batches.rows import make_batch
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.sampling import Sampling, draw, draws
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import argmax
from lmtrain.model.states import ModelState, select

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Generation:
    """What the model wrote to one prompt."""

    prompt: str
    completion: str
    text: str  # both, in the order in which they are read
    finished: bool  # it met its end token, or a text to stop at
    log_probability: float  # of the tokens written given the prompt, under the model as it is, natural logarithm
    tokens: list[tuple[str, float]]  # written, in that order, an end token included, each with its log-probability


@dataclass
class PartialText:
    """The tokens of one row, in the order in which they were written."""

    prompt: list[int]  # as it was read
    ids: list[int] = field(default_factory=list)  # without the end token
    log_probabilities: list[float] = field(default_factory=list)  # with that of the end token
    finished: bool = False


@torch.inference_mode()
def generate(
    model: LanguageModel,
    script: PromptCodec,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    count: int = 1,
    stop: Sequence[str] = (),
) -> list[Generation]:
    """Continue each prompt until the end token, one of the texts to stop at, or `max_tokens`.

    Args:
        prompts: texts; an empty one starts from nothing.
        sampling: how a token is chosen; None: always the most probable one.
        count: texts to each prompt, one after the other in the result.
        stop: texts that end a completion, and are cut off with what stands behind them.

    Raises:
        DataError: kind ids, and a prompt that is not ids.
    """
    texts = [text for text in prompts for _ in range(count)]
    numbers = _numbers(texts)
    results = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        part = texts[block]
        writer = _Writer(model, script, part, numbers[block], sampling, stop)
        for _ in writer.steps(max_tokens):
            pass
        results += [to_generation(script, text, row, stop) for text, row in zip(part, writer.rows, strict=True)]
    return results


@torch.inference_mode()
def stream(
    model: LanguageModel,
    script: PromptCodec,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The completion of one prompt as it comes, forward; arguments as `generate`.

    Only whole characters come out, and nothing that may turn out to be the beginning of a text to stop at.
    """
    writer = _Writer(model, script, [prompt], [0], sampling, stop)
    shown = ""
    for _ in writer.steps(max_tokens):
        text = _cut(script, script.completion(prompt, writer.rows[0].prompt, writer.rows[0].ids), stop)
        text = text.rstrip("\ufffd")  # the bytes of a character that is not whole yet
        text = text[: len(text) - _begun(text, stop)]
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = to_generation(script, prompt, writer.rows[0], stop).completion
    if rest != shown and rest.startswith(shown):
        yield rest[len(shown) :]


def _numbers(texts: Sequence[str]) -> list[int]:
    """How many equal texts stand before each."""
    seen, numbers = Counter[str](), []
    for text in texts:
        numbers.append(seen[text])
        seen[text] += 1
    return numbers


def to_generation(script: PromptCodec, text: str, row: PartialText, stop: Sequence[str] = ()) -> Generation:
    """A row as text."""
    completion = _cut(script, script.completion(text, row.prompt, row.ids), stop)
    whole = text + completion if script.direction == "forward" else completion + text
    names = [script.name(token) for token in row.ids]
    if len(row.log_probabilities) > len(names):
        assert script.end is not None
        names.append(script.name(script.end))
    tokens = list(zip(names, row.log_probabilities, strict=True))
    return Generation(text, completion, whole, row.finished, sum(row.log_probabilities), tokens)


def _cut(script: PromptCodec, completion: str, stop: Sequence[str]) -> str:
    """A completion up to the first of the texts to stop at; backward, from the last one on."""
    for text in stop:
        if text in completion:
            backward = script.direction == "backward"
            completion = completion.rpartition(text)[2] if backward else completion.partition(text)[0]
    return completion


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many of a text's last characters may be the beginning of a text to stop at."""
    lengths = (size for each in stop for size in range(1, len(each)) if text.endswith(each[:size]))
    return max(lengths, default=0)


class _Writer:
    """One batch of prompts on its way; rows that have met their end leave it."""

    def __init__(
        self,
        model: LanguageModel,
        script: PromptCodec,
        texts: Sequence[str],
        numbers: Sequence[int],
        sampling: Sampling | None,
        stop: Sequence[str],
    ) -> None:
        self.model, self.script, self.texts, self.sampling, self.stop = model, script, texts, sampling, stop
        self.rows = [PartialText(script.encode(text)) for text in texts]
        self.device = model.embedding.weight.device
        self.never = torch.tensor(script.never, device=self.device)
        self.generators = []
        if sampling is not None:
            numbered = zip(self.rows, numbers, strict=True)
            self.generators = [draws(sampling.seed, row.prompt, number) for row, number in numbered]

    def steps(self, max_tokens: int) -> Iterator[None]:
        """Write a token to each row that runs, again and again; pause after each round."""
        batch = make_batch([row.prompt for row in self.rows], self.script.tokenizer.pad_id)
        running = batch.order.tolist()  # the caller's row of each row that still runs
        logits, state = self.model.read_prompts(batch.tokens.to(self.device), batch.lengths, self.script.direction)
        for step in range(max_tokens):
            tokens, running, state = self._take(logits, running, state)
            yield
            if not running or step == max_tokens - 1:
                break
            logits, state = self.model(tokens.unsqueeze(0), state, self.script.direction)
            logits = logits.squeeze(0)

    def _take(self, logits: Tensor, running: list[int], state: ModelState) -> tuple[Tensor, list[int], ModelState]:
        """Choose each row's next token (B,), note it, and drop the rows that end with it."""
        log_probabilities = logits.log_softmax(-1).index_fill_(1, self.never, -torch.inf)  # (B, V)
        tokens = self._choose(logits, log_probabilities, running)
        chosen = log_probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
        going_on = []  # places among the rows that run
        for place, (number, token, log_probability) in enumerate(
            zip(running, tokens.tolist(), chosen.tolist(), strict=True)
        ):
            row = self.rows[number]
            row.log_probabilities.append(log_probability)
            if token != self.script.end:
                row.ids.append(token)
            row.finished = token == self.script.end or self._stops(number)
            if not row.finished:
                going_on.append(place)
        if len(going_on) == len(running):
            return tokens, running, state
        places = torch.tensor(going_on, dtype=torch.int64, device=tokens.device)
        return tokens[places], [running[place] for place in going_on], select(state, places)

    def _choose(self, logits: Tensor, log_probabilities: Tensor, running: list[int]) -> Tensor:
        if self.sampling is None:
            return argmax(log_probabilities)
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for place, number in enumerate(running):
                seen[place, self.rows[number].prompt + self.rows[number].ids] = True
        allowed = logits.index_fill(1, self.never, -torch.inf)
        found = self.sampling.probabilities(allowed, seen)
        return draw(found, [self.generators[number] for number in running]).to(logits.device)

    def _stops(self, number: int) -> bool:
        if not self.stop:
            return False
        row = self.rows[number]
        completion = self.script.completion(self.texts[number], row.prompt, row.ids)
        return any(text in completion for text in self.stop)
