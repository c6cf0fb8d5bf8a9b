"""Computes how probable text is under a model: a whole text (and how well its blanks are filled), or line by line.

Shapes: N events of a batch, V vocabulary, T tokens of a block of lines, start and end tokens included.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import Batch, Rows, sorted_parts
from lmtrain.data.store.token_store import StoreCounts
from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.framing import encode_block, frame_texts
from lmtrain.inference.prompts import PromptCodec
from lmtrain.metrics import Tally, bits_per, perplexity
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Direction, EncodedBatch, Objective, align
from lmtrain.model.output import argmax
from lmtrain.model.states import CarriedState

SCORED_TOKENS = 8192  # padded tokens per batch
LOGITS_AT_ONCE = 1 << 23  # bounds the memory that scoring takes, whatever the size of the vocabulary


@dataclass
class Evaluation:
    """Summed nats of each objective over a text; `forward` events include end tokens, `fill` events do not."""

    tallies: dict[Objective, Tally]
    counts: StoreCounts = field(default_factory=StoreCounts)
    without: dict[str, Tally] = field(default_factory=dict)  # forward sums that leave out `end_tokens`, ...
    adapted: dict[str, Tally] = field(default_factory=dict)  # forward sums with `cache` and `dynamic` evaluation

    @property
    def perplexity(self) -> float:
        """exp(nats per predicted token), end tokens included."""
        return self.tallies["forward"].perplexity

    def figures(self) -> dict[str, float | int | None]:
        """What `lmtrain evaluate --json` prints; None for what one direction, an empty text or ids do not have."""
        forward = self.tallies["forward"]
        backward, fill = self.tallies.get("backward"), self.tallies.get("fill")
        characters = self.counts.characters
        figures = {
            "tokens": forward.tokens,
            "nats_per_token": forward.nats_per_token,
            "perplexity": forward.perplexity,
            "bits_per_character": bits_per(characters, forward.nats),
            "bits_per_byte": bits_per(self.counts.bytes, forward.nats),
            "unknown_tokens": self.counts.unknown_tokens,
            **{f"perplexity_without_{name}": tally.perplexity for name, tally in self.without.items()},
            "backward_perplexity": None if backward is None else backward.perplexity,
            "backward_bits_per_character": None if backward is None else bits_per(characters, backward.nats),
            "fill_accuracy": None if fill is None else fill.accuracy,
            **{f"{name}_perplexity": tally.perplexity for name, tally in self.adapted.items()},
        }
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def encoded_batches(model: LanguageModel, batches: Iterable[Batch], columns: int | None) -> Iterator[EncodedBatch]:
    """Read batch after batch; the state of `columns` columns is carried along, or, with None, rows start from zeros."""
    carried = None if columns is None else CarriedState(columns)
    for batch in batches:
        before = None if carried is None else carried.of(batch.order)
        encoded = model.read(batch.tokens, batch.lengths, before)
        if carried is not None:
            carried.store(batch.order, encoded.state)
        yield encoded


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    columns: int | None = None,
    counts: StoreCounts | None = None,
    left_out: Mapping[str, Sequence[int]] | None = None,
) -> Evaluation:
    """Sum the nats of all events of all rows, and count the blanks whose best filling is right.

    Args:
        model: is in evaluation mode.
        columns: see `encoded_batches`.
        counts: characters and bytes of the text that the batches come from, for bits per character and byte.
        left_out: name -> token ids; each name gives one more sum, without the events that predict these ids.
    """
    assert not model.training
    result = Evaluation({objective: Tally() for objective in model.objectives}, counts or StoreCounts())
    excluded = {name: torch.tensor(ids) for name, ids in (left_out or {}).items()}
    result.without = {name: Tally() for name in excluded}
    rows_at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for encoded in encoded_batches(model, batches, columns):
        for objective, events in encoded.events.items():
            states, targets = events.states, events.targets
            if objective != "fill":
                nats, targets = model.nats(objective, events).cpu().double(), targets.cpu()  # (N,)
                result.tallies[objective].add(float(nats.sum()), len(targets))
                for name, ids in excluded.items() if objective == "forward" else ():
                    kept = ~torch.isin(targets, ids)
                    result.without[name].add(float(nats[kept].sum()), int(kept.sum()))
                continue
            for part, wanted in zip(states.split(rows_at_once), targets.split(rows_at_once), strict=True):
                log_probabilities = model.log_probabilities(objective, part, None)  # (N, V)
                nats = -log_probabilities.gather(1, wanted.unsqueeze(1)).cpu().double()
                correct = int((argmax(log_probabilities) == wanted).sum())
                result.tallies[objective].add(float(nats.sum()), len(wanted), correct)
    return result


@dataclass(frozen=True)
class Score:
    """How probable one line is; logarithms are natural."""

    line: int  # line number, from 1 on
    log_probability: float  # log-probability of the line and its end token
    tokens: int  # number of predicted tokens, the end token included
    unknown_tokens: int
    each: list[tuple[str, float]]  # (text, log-probability) of each predicted token, in text order; empty if not asked

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-probability of a token."""
        return -self.log_probability / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite if that overflows."""
        return perplexity(self.nats_per_token)


@dataclass
class _Framed:
    """Framed lines, in the form that `Rows` reads."""

    tokens: NDArray[np.unsignedinteger]  # (T,)
    offsets: NDArray[np.uint64]  # (lines + 1,)


@torch.inference_mode()
def score(
    model: LanguageModel,
    codec: PromptCodec,
    blocks: Iterable[Block],
    *,
    direction: Literal[Direction, "both"] = "forward",
    each: bool = False,
    max_length: int = 512,
) -> Iterator[Score]:
    """Score line after line, a block at a time, with a model in evaluation mode; see `TrainedModel.score`.

    A line of more than `max_length` tokens is cut into rows, each read from a state of zeros, as in evaluation.
    """
    tokenizer = codec.tokenizer
    directions: list[Direction] = ["forward", "backward"] if direction == "both" else [direction]
    start = replace(codec, direction="forward").start  # a row runs from start to end, in either direction
    unk_id = -1 if tokenizer.unk_id is None else tokenizer.unk_id
    for block in blocks:
        flat, ends = frame_texts(*encode_block(tokenizer, block)[:2], tokenizer.eos_id, start)
        offsets = np.concatenate([[0], ends])
        rows = Rows(_Framed(flat.astype(np.uint64), offsets.astype(np.uint64)), max_length)
        nats = _nats_of_tokens(model, rows, directions, tokenizer.pad_id)
        totals = np.add.reduceat(nats, offsets[:-1])
        unknown = np.add.reduceat(flat == unk_id, offsets[:-1], dtype=int)
        for number, (first, end) in enumerate(zip(offsets[:-1].tolist(), ends.tolist(), strict=True)):
            inner = slice(first + 1, end) if direction == "forward" else slice(first, end - 1)
            named = zip(map(codec.name, flat[inner].tolist()), (-nats[inner]).tolist(), strict=True) if each else ()
            yield Score(block.lines[number], -float(totals[number]), end - first - 1, int(unknown[number]), list(named))


def _nats_of_tokens(
    model: LanguageModel, rows: Rows, directions: Sequence[Direction], pad_id: int
) -> NDArray[np.float64]:
    """Compute each token's nats (T,), the mean over directions; 0 if a direction predicts nothing."""
    nats = np.zeros(len(rows.flat))
    for indices in sorted_parts(rows.row_lengths, SCORED_TOKENS):
        batch = rows.batch(indices, pad_id)
        starts: Ints = rows.starts[indices][batch.order.numpy()]
        events = model.read(batch.tokens, batch.lengths).events
        alignment = align(batch.lengths)
        row_starts = starts[alignment.rows.row.numpy()]
        predicted = {"forward": alignment.rows.time + 1, "backward": alignment.backward_time - 1}
        for direction in directions:
            event_nats = model.nats(direction, events[direction]).cpu().double().numpy()
            nats[row_starts + predicted[direction].numpy()] += event_nats / len(
                directions
            )  # a row predicts a token once
    return nats
