"""How probable text is under a model: perplexity in each direction, and how well blanks are filled.

Shapes: N events of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from lmtrain.data.batching import Batch
from lmtrain.data.corpus import StoreCounts
from lmtrain.metrics import Tally, bits_per
from lmtrain.model.language_model import LanguageModel, Objective, Reading
from lmtrain.model.output import argmax
from lmtrain.model.states import CarriedState

LOGITS_AT_ONCE = 1 << 23  # bounds the memory that scoring takes, whatever the vocabulary


@dataclass
class Evaluation:
    """Summed nats of each objective over a text; `forward` events count end tokens, `fill` events do not."""

    tallies: dict[Objective, Tally]
    counts: StoreCounts = field(default_factory=StoreCounts)
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
            "backward_perplexity": None if backward is None else backward.perplexity,
            "fill_accuracy": None if fill is None else fill.accuracy,
            **{f"{name}_perplexity": tally.perplexity for name, tally in self.adapted.items()},
        }
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def readings(model: LanguageModel, batches: Iterable[Batch], columns: int | None) -> Iterator[Reading]:
    """Read batch after batch.

    Args:
        columns: that carry their state from batch to batch; None: each row begins anew.
    """
    device, carried = model.embedding.weight.device, None if columns is None else CarriedState(columns)
    for batch in batches:
        before = None if carried is None else carried.of(batch.order)
        reading = model.read(batch.tokens.to(device), batch.lengths, before)
        if carried is not None:
            carried.put(batch.order, reading.state)
        yield reading


@torch.inference_mode()
def evaluate(
    model: LanguageModel, batches: Iterable[Batch], columns: int | None = None, counts: StoreCounts | None = None
) -> Evaluation:
    """Sum the nats of every event of every row, and count the blanks whose best filling is right.

    Args:
        model: in evaluation mode.
        columns: that carry their state from batch to batch; None: each row begins anew.
        counts: of the text the batches come from, for bits per character and byte.
    """
    assert not model.training
    result = Evaluation({objective: Tally() for objective in model.objectives}, counts or StoreCounts())
    rows_at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for reading in readings(model, batches, columns):
        for objective, (states, targets) in reading.events.items():
            if objective != "fill":
                nats = model.output.nats(states, targets).double().sum()
                result.tallies[objective].add(float(nats), len(targets), 0)
                continue
            for part, wanted in zip(states.split(rows_at_once), targets.split(rows_at_once), strict=True):
                log_probabilities = model.output.log_probabilities(part)  # (N, V)
                nats = -log_probabilities.gather(1, wanted.unsqueeze(1)).double().sum()
                correct = int((argmax(log_probabilities) == wanted).sum())
                result.tallies[objective].add(float(nats), len(wanted), correct)
    return result
