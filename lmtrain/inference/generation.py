"""A model writes text to a batch of prompts, greedily or at random; each row runs until its own end.

Shapes: B rows that still run, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count as numbers_from

import torch
from torch import Tensor

from lmtrain.data.batches.rows import make_batch
from lmtrain.inference.options import Sampling
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.sampling import draw_tokens, random_generator, token_probabilities
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import argmax
from lmtrain.model.states import ModelState, select

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Generation:
    """What the model wrote to one prompt."""

    prompt: str
    completion: str
    text: str  # prompt and completion, in the order in which they are read
    finished: bool  # the text reached its end token or a stop text
    log_probability: float  # natural logarithm, of the written tokens given the prompt, without sampling settings
    tokens: list[tuple[str, float]]  # (text, log-probability) as they were written, the end token included


@dataclass
class PartialText:
    """The tokens that were written to one prompt so far, in the order in which they were written."""

    prompt: list[int]  # ids, as the model read them
    ids: list[int] = field(default_factory=list)  # without the end token
    log_probabilities: list[float] = field(default_factory=list)  # including that of the end token
    finished: bool = False


@torch.inference_mode()
def generate(
    model: LanguageModel,
    codec: PromptCodec,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    count: int = 1,
    stop: Sequence[str] = (),
    broken_off: Callable[[], bool] = lambda: False,
) -> list[Generation]:
    """Continue each prompt until its end token, one of the stop texts, or `max_tokens`; see `TrainedModel.generate`.

    Args:
        broken_off: is called after each token; once it returns True, every text ends where it is.
    """
    texts = [text for text in prompts for _ in range(count)]
    repetitions = defaultdict[str, Iterator[int]](numbers_from)
    numbers = [next(repetitions[text]) for text in texts]  # how many equal texts precede each: a, b, a -> 0, 0, 1
    results = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        part = texts[block]
        writer = _Writer(model, codec, part, numbers[block], sampling, stop)
        for _ in writer.steps(max_tokens):
            if broken_off():
                break
        results += [to_generation(codec, text, row, stop) for text, row in zip(part, writer.rows, strict=True)]
    return results


@torch.inference_mode()
def stream(
    model: LanguageModel,
    codec: PromptCodec,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the completion of one prompt piece by piece while it is written; arguments as `generate`.

    Pieces are whole characters, and never contain what may turn out to be the beginning of a stop text.
    """
    writer = _Writer(model, codec, [prompt], [0], sampling, stop)
    shown = ""
    for _ in writer.steps(max_tokens):
        text = _cut_at_stop(codec, codec.completion(prompt, writer.rows[0].prompt, writer.rows[0].ids), stop)
        text = text.rstrip("\ufffd")  # bytes of a character that is not complete yet
        text = text[: len(text) - _partial_stop_length(text, stop)]
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    whole = to_generation(codec, prompt, writer.rows[0], stop).completion
    if whole != shown and whole.startswith(shown):
        yield whole[len(shown) :]


def to_generation(codec: PromptCodec, prompt: str, row: PartialText, stop: Sequence[str] = ()) -> Generation:
    """Decode the tokens that were written to a prompt."""
    completion = _cut_at_stop(codec, codec.completion(prompt, row.prompt, row.ids), stop)
    text = prompt + completion if codec.direction == "forward" else completion + prompt
    names = [codec.name(token) for token in row.ids]
    if len(row.log_probabilities) > len(names):
        assert codec.end is not None
        names.append(codec.name(codec.end))
    tokens = list(zip(names, row.log_probabilities, strict=True))
    return Generation(prompt, completion, text, row.finished, sum(row.log_probabilities), tokens)


def _cut_at_stop(codec: PromptCodec, completion: str, stop: Sequence[str]) -> str:
    """Return a completion up to its first stop text; of a backward completion, what follows its last one."""
    for text in stop:
        if text in completion:
            backward = codec.direction == "backward"
            completion = completion.rpartition(text)[2] if backward else completion.partition(text)[0]
    return completion


def _partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """Count the last characters of a text that may be the beginning of a stop text."""
    lengths = (size for each in stop for size in range(1, len(each)) if text.endswith(each[:size]))
    return max(lengths, default=0)


class _Writer:
    """Writes to one batch of prompts; rows that have reached their end leave the batch."""

    def __init__(
        self,
        model: LanguageModel,
        codec: PromptCodec,
        prompts: Sequence[str],
        numbers: Sequence[int],
        sampling: Sampling | None,
        stop: Sequence[str],
    ) -> None:
        self.model, self.codec, self.prompts, self.sampling, self.stop = model, codec, prompts, sampling, stop
        self.rows = [PartialText(codec.encode(prompt)) for prompt in prompts]
        self.device = model.embedding.weight.device
        self.excluded = torch.tensor(codec.excluded_ids, device=self.device)
        self.generators = []
        if sampling is not None:
            numbered = zip(self.rows, numbers, strict=True)
            self.generators = [random_generator(sampling.seed, row.prompt, number) for row, number in numbered]

    def steps(self, max_tokens: int) -> Iterator[None]:
        """Write one token to each row that still runs, then yield; repeat until no row runs, or `max_tokens`."""
        batch = make_batch([row.prompt for row in self.rows], self.codec.tokenizer.pad_id)
        running = batch.order.tolist()  # index in `self.rows` of each row that still runs
        logits, state = self.model.read_prompts(batch.tokens.to(self.device), batch.lengths, self.codec.direction)
        for step in range(max_tokens):
            tokens, running, state = self._append(logits, running, state)
            yield
            if not running or step == max_tokens - 1:
                break
            logits, state = self.model(tokens.unsqueeze(0), state, self.codec.direction)
            logits = logits.squeeze(0)

    def _append(self, logits: Tensor, running: list[int], state: ModelState) -> tuple[Tensor, list[int], ModelState]:
        """Choose the next token of each running row by its logits (B, V), append it, and drop the rows that it ends.
        Returns the tokens (B,), the indices in `self.rows` and the state of the rows that are left."""
        log_probabilities = logits.log_softmax(-1).index_fill_(1, self.excluded, -torch.inf)  # (B, V)
        tokens = self._choose(logits, log_probabilities, running)
        chosen = log_probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
        kept = []  # positions in `running`
        choices = zip(running, tokens.tolist(), chosen.tolist(), strict=True)
        for position, (index, token, log_probability) in enumerate(choices):
            row = self.rows[index]
            row.log_probabilities.append(log_probability)
            if token != self.codec.end:
                row.ids.append(token)
            completion = self.codec.completion(self.prompts[index], row.prompt, row.ids) if self.stop else ""
            row.finished = token == self.codec.end or any(text in completion for text in self.stop)
            if not row.finished:
                kept.append(position)
        if len(kept) == len(running):
            return tokens, running, state
        rows = torch.tensor(kept, dtype=torch.int64, device=tokens.device)
        return tokens[rows], [running[position] for position in kept], select(state, rows)

    def _choose(self, logits: Tensor, log_probabilities: Tensor, running: list[int]) -> Tensor:
        """Choose the next token (B,) of each running row."""
        if self.sampling is None:
            return argmax(log_probabilities)
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for position, index in enumerate(running):
                seen[position, self.rows[index].prompt + self.rows[index].ids] = True
        allowed = logits.index_fill(1, self.excluded, -torch.inf)
        probabilities = token_probabilities(self.sampling, allowed, seen)
        return draw_tokens(probabilities, [self.generators[index] for index in running]).to(logits.device)
