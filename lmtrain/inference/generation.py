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
from lmtrain.inference.prompts import GrowingText, PromptCodec
from lmtrain.inference.sampling import choose_candidates, draw_tokens, random_generator
from lmtrain.inference.scoring import LOGITS_AT_ONCE
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import argmax
from lmtrain.model.states import ModelState, select

ROWS_AT_ONCE = 256
UNREAD = 64  # tokens of a row whose log-probabilities stay on the device before they are fetched together


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
    stopped: Callable[[], bool] = lambda: False,
) -> list[Generation]:
    """Continue each prompt until its end token, one of the stop texts, or `max_tokens`; see `TrainedModel.generate`.

    Args:
        stopped: is called after each token; once it returns True, no text is returned.
    """
    texts = [text for text in prompts for _ in range(count)]
    repetitions = defaultdict[str, Iterator[int]](numbers_from)
    numbers = [next(repetitions[text]) for text in texts]  # how many equal texts precede each: a, b, a -> 0, 0, 1
    results = []
    at_once = rows_at_once(model)
    for start in range(0, len(texts), at_once):
        block = slice(start, start + at_once)
        part = texts[block]
        writer = _Writer(model, codec, part, numbers[block], sampling, stop)
        for _ in writer.steps(max_tokens):
            if stopped():
                return []
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
    writer = _Writer(model, codec, [prompt], [0], sampling, stop, follow=True)
    row, text, shown, agree = writer.rows[0], writer.texts[0], list[str](), True
    for _ in writer.steps(max_tokens):
        agree = agree and text.changed >= len(shown)
        if not agree or row.finished or codec.tokenizer.may_change(row.ids[-1]):
            continue
        end = len(text.characters)
        end -= text.characters[-1:] == ["\ufffd"]  # bytes of a character that is not complete yet
        end -= _partial_stop_length("".join(text.characters[max(0, end - writer.longest_stop) : end]), stop)
        if end > len(shown):
            piece = text.characters[len(shown) : end]
            yield "".join(piece)
            shown += piece
    whole, before = _cut_at_stop(codec, codec.completion(prompt, row.prompt, row.ids), stop), "".join(shown)
    if whole != before and whole.startswith(before):
        yield whole[len(before) :]


def rows_at_once(model: LanguageModel) -> int:
    """Return how many rows are written together, so that memory is bounded whatever the size of the vocabulary."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // model.vocab_size))


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
    """Writes to one batch of prompts; rows that have reached their end leave the batch.

    Args:
        follow: keep the rows' texts up to date in `texts` while they are written. Stop texts need that in any case.
    """

    def __init__(
        self,
        model: LanguageModel,
        codec: PromptCodec,
        prompts: Sequence[str],
        numbers: Sequence[int],
        sampling: Sampling | None,
        stop: Sequence[str],
        follow: bool = False,
    ) -> None:
        self.model, self.codec, self.sampling = model, codec, sampling
        self.rows = [PartialText(codec.encode(prompt)) for prompt in prompts]
        pairs = zip(prompts, self.rows, strict=True)
        self.texts = [GrowingText(codec, text, row.prompt) for text, row in pairs] if stop or follow else []
        self.stops, self.longest_stop = [codec.as_written(text) for text in stop], max(map(len, stop), default=0)
        self.device = model.embedding.weight.device
        self.excluded = torch.tensor(codec.excluded_ids, device=self.device)
        self.seen: Tensor | None = None  # (B, V) bool, marks the tokens in each running row's text
        self.unread: list[tuple[list[int], Tensor]] = []  # running rows, and the log-probability (B,) of their tokens
        self.generators = []
        if sampling is not None:
            numbered = zip(self.rows, numbers, strict=True)
            self.generators = [random_generator(sampling.seed, row.prompt, number) for row, number in numbered]

    def steps(self, max_tokens: int) -> Iterator[None]:
        """Write one token to each row that still runs, then yield; repeat until no row runs, or `max_tokens`."""
        batch = make_batch([row.prompt for row in self.rows], self.codec.tokenizer.pad_id)
        running = batch.order.tolist()  # index in `self.rows` of each row that still runs
        if self.sampling is not None and self.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(running), self.model.vocab_size, dtype=torch.bool, device=self.device)
            # padding is never written, so that it may count as seen
            self.seen.scatter_(1, batch.tokens.t().to(self.device), True)
        logits, state = self.model.read_prompts(batch.tokens.to(self.device), batch.lengths, self.codec.direction)
        for step in range(max_tokens):
            tokens, running, state = self._append(logits, running, state)
            if not running or step == max_tokens - 1 or len(self.unread) == UNREAD:
                self._read_log_probabilities()
            yield
            if not running or step == max_tokens - 1:
                break
            logits, state = self.model(tokens.unsqueeze(0), state, self.codec.direction)
            logits = logits.squeeze(0)

    def _append(self, logits: Tensor, running: list[int], state: ModelState) -> tuple[Tensor, list[int], ModelState]:
        """Choose the next token of each running row by its logits (B, V), append it, and drop the rows that it ends.
        Returns the tokens (B,), the indices in `self.rows` and the state of the rows that are left."""
        log_probabilities = logits.log_softmax(-1).index_fill_(1, self.excluded, -torch.inf)  # (B, V)
        on_cpu = self._choose(logits, log_probabilities, running)  # the only wait for the device
        tokens = on_cpu.to(self.device)
        self.unread.append((running, log_probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)))
        kept = []  # positions in `running`
        for position, (index, token) in enumerate(zip(running, on_cpu.tolist(), strict=True)):
            self._append_to_row(index, token)
            if not self.rows[index].finished:
                kept.append(position)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        if len(kept) == len(running):
            return tokens, running, state
        rows = torch.tensor(kept, dtype=torch.int64, device=self.device)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, rows)
        return tokens[rows], [running[position] for position in kept], select(state, rows)

    def _append_to_row(self, index: int, token: int) -> None:
        row = self.rows[index]
        if token == self.codec.end:
            row.finished = True
            return
        row.ids.append(token)
        if self.texts:
            text = self.texts[index]
            text.append(token)
            new = "".join(text.characters[max(0, text.changed - self.longest_stop + 1) :])
            row.finished = any(stop in new for stop in self.stops)

    def _read_log_probabilities(self) -> None:
        """Give each row the log-probabilities of its tokens, which have stayed on the device until now."""
        values = iter(torch.cat([values for _, values in self.unread]).tolist())
        for running, _ in self.unread:
            for index in running:
                self.rows[index].log_probabilities.append(next(values))
        self.unread = []

    def _choose(self, logits: Tensor, log_probabilities: Tensor, running: list[int]) -> Tensor:
        """Choose the next token of each running row, (B,) on CPU."""
        if self.sampling is None:
            return argmax(log_probabilities).cpu()
        candidates = choose_candidates(self.sampling, logits.index_fill(1, self.excluded, -torch.inf), self.seen)
        return draw_tokens(candidates, [self.generators[index] for index in running])
