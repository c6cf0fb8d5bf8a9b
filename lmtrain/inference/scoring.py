"""How probable text is under a model: of a whole text, how well its blanks are filled, and line by line.

Shapes: N events of a batch, V vocabulary, T tokens of a block of lines, start and end tokens counted.
"""

from __future__ import annotations

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

SCORED_TOKENS = 8192  # padded tokens a batch
LOGITS_AT_ONCE = 1 << 23  # bounds the memory that scoring takes, whatever the vocabulary


@dataclass
class Evaluation:
    """Summed nats of each objective over a text; `forward` events count end tokens, `fill` events do not."""

    tallies: dict[Objective, Tally]
    counts: StoreCounts = field(default_factory=StoreCounts)
    without: dict[str, Tally] = field(default_factory=dict)  # forward, some targets left out: `end_tokens`, ...
    adapted: dict[str, Tally] = field(default_factory=dict)  # by `cache` and `dynamic`, beside the plain figures

    @property
    def perplexity(self) -> float:
        """exp(nats per predicted token), end tokens counted."""
        return self.tallies["forward"].perplexity

    def figures(self) -> dict[str, float | int | None]:
        """What `lmtrain evaluate --json` prints; None for what a one-directional model or an empty text can't say."""
        forward = self.tallies["forward"]
        backward, fill = self.tallies.get("backward"), self.tallies.get("fill")
        figures = {
            "tokens": forward.tokens,
            "nats_per_token": forward.nats_per_token,
            "perplexity": forward.perplexity,
            "bits_per_character": bits_per(self.counts.characters, forward.nats),
            "bits_per_byte": bits_per(self.counts.bytes, forward.nats),
            "unknown_tokens": self.counts.unknown_tokens,
            **{f"perplexity_without_{name}": tally.perplexity for name, tally in self.without.items()},
            "backward_perplexity": None if backward is None else backward.perplexity,
            "backward_bits_per_character": None
            if backward is None
            else bits_per(self.counts.characters, backward.nats),
            "fill_accuracy": None if fill is None else fill.accuracy,
            **{f"{name}_perplexity": tally.perplexity for name, tally in self.adapted.items()},
        }
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def encoded_batches(model: LanguageModel, batches: Iterable[Batch], columns: int | None) -> Iterator[EncodedBatch]:
    """Read batch after batch.

    Args:
        columns: that carry their state from batch to batch; None: each row begins anew.
    """
    device, carried = model.embedding.weight.device, None if columns is None else CarriedState(columns)
    for batch in batches:
        before = None if carried is None else carried.of(batch.order)
        reading = model.read(batch.tokens.to(device), batch.lengths, before)
        if carried is not None:
            carried.store(batch.order, reading.state)
        yield reading


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    columns: int | None = None,
    counts: StoreCounts | None = None,
    left_out: Mapping[str, Sequence[int]] | None = None,
) -> Evaluation:
    """Sum the nats of every event of every row, and count the blanks whose best filling is right.

    Args:
        model: in evaluation mode.
        columns: that carry their state from batch to batch; None: each row begins anew.
        counts: of the text the batches come from, for bits per character and byte.
        left_out: targets to sum up without, beside the sum of all, by name.
    """
    assert not model.training
    result = Evaluation({objective: Tally() for objective in model.objectives}, counts or StoreCounts())
    device = model.embedding.weight.device
    apart = {name: torch.tensor(ids, device=device) for name, ids in (left_out or {}).items()}
    result.without = {name: Tally() for name in apart}
    rows_at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for reading in encoded_batches(model, batches, columns):
        for objective, events in reading.events.items():
            states, targets = events.states, events.targets
            if objective != "fill":
                each = model.nats(objective, events).double()
                result.tallies[objective].add(float(each.sum()), len(targets))
                for name, ids in apart.items() if objective == "forward" else ():
                    kept = ~torch.isin(targets, ids)
                    result.without[name].add(float(each[kept].sum()), int(kept.sum()))
                continue
            for part, wanted in zip(states.split(rows_at_once), targets.split(rows_at_once), strict=True):
                log_probabilities = model.log_probabilities(objective, part, None)  # (N, V)
                nats = -log_probabilities.gather(1, wanted.unsqueeze(1)).double().sum()
                correct = int((argmax(log_probabilities) == wanted).sum())
                result.tallies[objective].add(float(nats), len(wanted), correct)
    return result


@dataclass(frozen=True)
class Score:
    """How probable one line is, natural logarithm."""

    line: int  # from 1 on
    log_probability: float  # of the line and its end
    tokens: int  # that were predicted, the end token counted
    unknown_tokens: int
    each: list[tuple[str, float]]  # every token that was predicted, in the order of the text; empty unless asked for

    @property
    def nats_per_token(self) -> float:
        """What a token costs on average."""
        return -self.log_probability / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        return perplexity(self.nats_per_token)


@dataclass
class _Framed:
    """Lines as ids, as `Rows` reads them."""

    tokens: NDArray[np.unsignedinteger]  # (T,)
    offsets: NDArray[np.uint64]  # (lines + 1,)


@torch.inference_mode()
def score(
    model: LanguageModel,
    script: PromptCodec,
    blocks: Iterable[Block],
    *,
    direction: Literal[Direction, "both"] = "forward",
    each: bool = False,
    max_length: int = 512,
) -> Iterator[Score]:
    """Score line after line, in the order of the text, a block at a time: memory does not grow with the text.

    Args:
        model: in evaluation mode.
        direction: both: the mean of the two log-probabilities, each of which is one of the whole line.
        each: give every token's own, too; of one direction.
        max_length: a longer line is read in rows of so many tokens, each of which begins anew, as in evaluation.

    Raises:
        DataError: kind ids, and a line that is not ids, with its place.
    """
    tokenizer = script.tokenizer
    directions: list[Direction] = ["forward", "backward"] if direction == "both" else [direction]
    start = replace(script, direction="forward").start  # a row reads start to end, whichever end is predicted
    for block in blocks:
        flat, ends = frame_texts(*encode_block(tokenizer, block, block.texts), tokenizer.eos_id, start)
        offsets = np.concatenate([[0], ends])
        rows = Rows(_Framed(flat.astype(np.uint64), offsets.astype(np.uint64)), max_length)
        nats = _nats_of_tokens(model, rows, directions, tokenizer.pad_id)
        totals = np.add.reduceat(nats, offsets[:-1])
        unknown = np.add.reduceat(
            (flat == (-1 if tokenizer.unk_id is None else tokenizer.unk_id)), offsets[:-1], dtype=int
        )
        for number, (first, end) in enumerate(zip(offsets[:-1].tolist(), ends.tolist(), strict=True)):
            inner = slice(first + 1, end) if direction == "forward" else slice(first, end - 1)
            named = [script.name(token) for token in flat[inner].tolist()] if each else []
            values = (-nats[inner]).tolist() if each else []
            yield Score(
                block.first_line + number,
                -float(totals[number]),
                end - first - 1,
                int(unknown[number]),
                list(zip(named, values, strict=True)),
            )


def _nats_of_tokens(
    model: LanguageModel, rows: Rows, directions: Sequence[Direction], pad_id: int
) -> NDArray[np.float64]:
    """What each token costs, (T,), the mean over the directions; 0 where a direction does not predict it."""
    device = model.embedding.weight.device
    nats = np.zeros(len(rows.flat))
    for indices in sorted_parts(rows.row_lengths, SCORED_TOKENS):
        batch = rows.batch(indices, pad_id)
        starts: Ints = rows.starts[indices][batch.order.numpy()]
        events = model.read(batch.tokens.to(device), batch.lengths).events
        places = align(batch.lengths)
        of_row = starts[places.rows.row.numpy()]
        predicted = {"forward": places.rows.time + 1, "backward": places.backward_time - 1}
        for direction in directions:
            found = model.nats(direction, events[direction]).double().cpu().numpy()
            nats[of_row + predicted[direction].numpy()] += found / len(directions)  # a row predicts a token once
    return nats
