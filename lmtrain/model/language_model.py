"""The language model: embedding, one or two recurrent stacks, output layer, and its three objectives.

Shapes: B rows, L longest row, E embedding size, H hidden size, P output size, V vocabulary, N packed rows.

A row is `<bos> t1 .. tn <eos>`. The forward stack reads it from the left and predicts the next token, the backward
stack reads it from the right and predicts the previous one: each gives a true probability of the whole row. The
forward state before a token beside the backward state behind it predicts that token itself (fill). No state has
ever seen what it is asked to predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lmtrain.model.dropout import drop
from lmtrain.model.embedding import Lookups
from lmtrain.model.output import AdaptiveOutput, FullOutput
from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.recurrence import Backend, Cell, RecurrentLayers, RecurrentStack, State

Objective = Literal["forward", "backward", "fill"]


class Events(NamedTuple):
    """What one objective predicts in a batch, packed: a state and a target for each event."""

    states: Tensor  # (events, P)
    targets: Tensor  # (events,) int64


class Loss(NamedTuple):
    """Nats summed over an objective's events, and how many these are."""

    nats: Tensor  # () float32, outside the graph
    tokens: int


class Losses(NamedTuple):
    """What a batch costs."""

    total: Tensor  # () the objectives' nats, weighted: what is differentiated
    parts: dict[Objective, Loss]


class Places(NamedTuple):
    """Where rows of the given lengths, `<bos>` and `<eos>` counted, are read and what each place predicts.

    Both stacks read lengths - 1 tokens a row. The step of packed row k being time[k], the forward stack has read
    tokens[time] and predicts tokens[time + 1]; the backward stack, counted from the row's end, has read
    tokens[last - time] and predicts tokens[last - time - 1].
    """

    rows: PackedRows
    read_back: Tensor  # (N,) time at which the token that the backward stack reads stands
    fill_forward: Tensor  # (M,) packed row of the forward state before each inner token
    fill_backward: Tensor  # (M,) packed row of the backward state behind the same token


def lay_out(lengths: Tensor) -> Places:
    """Places of the rows of a batch; lengths (B,) int64 on CPU, non-increasing, >= 2."""
    rows = pack_rows(lengths - 1)
    read_back = rows.lengths[rows.row] - rows.time
    inner = rows.time < rows.lengths[rows.row] - 1  # the last event of a row is its end, not an inner token
    time, row = rows.time[inner], rows.row[inner]
    fill_backward = rows.at(rows.lengths[row] - 2 - time, row)
    return Places(rows, read_back, inner.nonzero().squeeze(1), fill_backward)


def count_events(lengths: Tensor) -> dict[Objective, int]:
    """How many tokens each objective predicts in rows of the given lengths, `<bos>` and `<eos>` counted."""
    rows, tokens = len(lengths), int(lengths.sum())
    return {"forward": tokens - rows, "backward": tokens - rows, "fill": tokens - 2 * rows}


class LanguageModel(nn.Module):
    """A recurrent language model of one or two directions.

    Args:
        vocab_size: V, special tokens counted.
        embedding_size, hidden_size, num_layers, cell, bidirectional, dropout: as in the config's `model` section.
        tie_weights: the output layer uses the embedding's weight; states are projected to its size.
        output: `full`, or `adaptive` for a large vocabulary (then not tied).
        backend: as `RecurrentStack`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        cell: Cell = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        tie_weights: bool = True,
        output: Literal["full", "adaptive"] = "full",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.vocab_size, self.dropout, self.bidirectional = vocab_size, dropout, bidirectional
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.recurrence = RecurrentLayers(
            cell, embedding_size, hidden_size, num_layers, bidirectional, dropout, backend
        )
        size = embedding_size if tie_weights else hidden_size
        self.output = FullOutput(size, vocab_size) if output == "full" else AdaptiveOutput(size, vocab_size)
        self.projections = nn.ModuleDict()
        for objective in self.objectives:
            if objective == "fill":
                self.projections[f"of_{objective}"] = nn.Sequential(
                    nn.Linear(2 * hidden_size, hidden_size),
                    nn.Tanh(),
                    nn.Linear(hidden_size, size, bias=False),
                )
            elif size == hidden_size:
                self.projections[f"of_{objective}"] = nn.Identity()
            else:
                self.projections[f"of_{objective}"] = nn.Linear(hidden_size, size, bias=False)
        self.reset_parameters()
        if tie_weights:
            assert isinstance(self.output, FullOutput), "adaptive output layers have weights of their own"
            self.output.weight = self.embedding.weight

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the model predicts: the next token, and with two directions the previous and the one between."""
        return ("forward", "backward", "fill") if self.bidirectional else ("forward",)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform embeddings; the recurrent stacks have their own start, the rest PyTorch's."""
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if isinstance(self.output, FullOutput):
            nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read on to the right: tokens (L, B), rows of equal length -> logits (L, B, V) of each next token, state."""
        embedded, forward = self.embedding(tokens), self.recurrence.stacks[0]  # (L, B, E)
        assert isinstance(forward, RecurrentStack)
        if len(tokens) == 1:
            states, state = forward.step(embedded[0], state)
        else:
            rows = pack_rows(torch.full((tokens.shape[1],), tokens.shape[0]))
            states, state = forward(embedded.flatten(0, 1), rows, state)
        logits = self._logits(self.projections["of_forward"](states))
        return logits.unflatten(0, tokens.shape), state

    def read_prompts(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """Ragged prompts: tokens (L, B), lengths (B,) on CPU, longest first -> logits (B, V) after each, state."""
        rows = pack_rows(lengths)
        states, state = self.recurrence.stacks[0](self.embedding(tokens[rows.time, rows.row]), rows)
        return self._logits(self.projections["of_forward"](states[rows.last])), state

    def _logits(self, states: Tensor) -> Tensor:
        if isinstance(self.output, FullOutput):
            logits: Tensor = self.output(states)
            return logits.float()
        return self.output.log_probabilities(states)  # log-probabilities are logits, too

    def events(self, tokens: Tensor, lengths: Tensor) -> dict[Objective, Events]:
        """Read a batch and give each objective's states and targets.

        Args:
            tokens: (L, B) int64, rows longest first, each from its `<bos>` to its `<eos>`.
            lengths: (B,) int64 on CPU, non-increasing, >= 2.
        """
        return self._events(tokens, lengths, Lookups(self.embedding.weight, self.embedding.sparse))

    def _events(self, tokens: Tensor, lengths: Tensor, lookups: Lookups) -> dict[Objective, Events]:
        places = lay_out(lengths)
        device = tokens.device
        time, row = places.rows.time.to(device), places.rows.row.to(device)
        states = {"forward": self._read(0, lookups(tokens[time, row]), places.rows)}  # (N, H)
        targets = {"forward": tokens[time + 1, row]}
        if self.bidirectional:
            back = places.read_back.to(device)
            states["backward"] = self._read(1, lookups(tokens[back, row]), places.rows)
            targets["backward"] = tokens[back - 1, row]
            before, behind = places.fill_forward.to(device), places.fill_backward.to(device)
            sides = states["forward"].index_select(0, before), states["backward"].index_select(0, behind)
            states["fill"] = torch.cat(sides, 1)  # (M, 2H)
            targets["fill"] = targets["forward"][before]
        return {name: Events(self.projections[f"of_{name}"](states[name]), targets[name]) for name in self.objectives}

    def _read(self, direction: int, embedded: Tensor, rows: PackedRows) -> Tensor:
        states, _ = self.recurrence.stacks[direction](self._drop(embedded), rows)  # (N, E) -> (N, H)
        return self._drop(states)

    def _drop(self, values: Tensor) -> Tensor:
        return drop(values, self.dropout, self.training)

    def loss(self, tokens: Tensor, lengths: Tensor, weights: Mapping[Objective, float] | None = None) -> Losses:
        """Nats of each objective, and their weighted sum; arguments as `events`. Padding is never scored.

        Args:
            weights: of a nat of each objective in the total; 1 where left out.
        """
        lookups = Lookups(self.embedding.weight, self.embedding.sparse)
        events = self._events(tokens, lengths, lookups)
        states, targets = (torch.cat(parts) for parts in zip(*events.values(), strict=True))
        sizes = [len(part.targets) for part in events.values()]
        each = torch.tensor([1.0 if weights is None else weights[name] for name in events])
        of_events = each.repeat_interleave(torch.tensor(sizes)).to(states.device)
        if isinstance(self.output, FullOutput):
            tied = lookups.tied() if self.output.weight is self.embedding.weight else None
            total, nats = self.output.loss(states, targets, of_events, tied)  # one product for all objectives
        else:
            total, nats = self.output.loss(states, targets, of_events)
        parts = zip(events, nats.split(sizes), sizes, strict=True)
        return Losses(total, {name: Loss(part.sum(), size) for name, part, size in parts})
