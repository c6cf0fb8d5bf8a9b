"""The language model: embedding, one or two recurrent stacks, output layer, and its three objectives.

Shapes: B rows, L longest row, E embedding size, H hidden size, P output size, V vocabulary, N packed rows.

A row is `<bos> t1 .. tn <eos>`. The forward stack reads it from the left and predicts the next token, the backward
stack reads it from the right and predicts the previous one: each gives a true probability of the whole row. The
forward state before a token beside the backward state behind it predicts that token itself (fill). No state has
ever seen what it is asked to predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lmtrain.model.directions import RecurrentLayers
from lmtrain.model.dropout import drop, drop_locked, drop_words
from lmtrain.model.embedding import Lookups
from lmtrain.model.ngrams.counts import CountedNgrams
from lmtrain.model.ngrams.embedding import NgramEmbedding
from lmtrain.model.ngrams.history import context_of, history_after, history_at
from lmtrain.model.objectives import Direction, EncodedBatch, Events, Loss, Losses, Objective, align
from lmtrain.model.output import AdaptiveOutput, FullOutput, sample_vocabulary
from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.recurrence import Backend, Cell, RecurrentStack
from lmtrain.model.states import State


class _Before(NamedTuple):
    """What was read up to N places, beside what the recurrence knows of it."""

    direct: Tensor | None  # (N, P) what n-grams say to the output layer
    history: Tensor | None  # (N, H) by which counted n-grams go
    state: State  # what a state holds of it, behind the stack's own


NOTHING_BEFORE = _Before(None, None, ())


class LanguageModel(nn.Module):
    """A recurrent language model of one or two directions.

    Args:
        vocab_size: V, special tokens counted.
        embedding_size, hidden_size, num_layers, cell, bidirectional, dropout: as in the config's `model` section.
        layer_sizes: H of each layer, in place of `hidden_size` and `num_layers`.
        residual, layer_norm, backend, layer_dropout, weight_dropout: as `RecurrentStack`.
        tie_weights: the output layer uses the embedding's weight; states are projected to its size.
        ngram_embeddings, ngram_embedding_dropout: orders of the n-grams that are connected to the output layer
            directly, by way of `ngram_embedding_buckets` vectors each; see `NgramEmbedding`.
        ngram_counts: order of the n-grams that are counted in the training text and mixed with each direction; see
            `CountedNgrams`. They are to be put in by `load_counts`.
        output: `full`, or `adaptive` for a large vocabulary (then not tied).
        input_dropout, output_dropout: share of the features of embeddings and of states before the output layer that
            are zeroed, locked over a row's steps.
        embedding_dropout: share of the vocabulary whose embeddings are zeroed in a batch.
        activation_penalty, temporal_penalty: see `_penalty`.
        label_smoothing: see `FullOutput.loss`; with `output: full` only.
        sampled_tokens, frequent_tokens: score a part of the vocabulary in training; see `sample_vocabulary`; None: all.
    """

    history: int

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        layer_sizes: Sequence[int] | None = None,
        cell: Cell = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        ngram_embeddings: Sequence[int] = (),
        ngram_embedding_buckets: int = 16384,
        ngram_counts: int | None = None,
        tie_weights: bool = True,
        output: Literal["full", "adaptive"] = "full",
        backend: Backend = "auto",
        input_dropout: float = 0.0,
        layer_dropout: float = 0.0,
        output_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        ngram_embedding_dropout: float = 0.0,
        activation_penalty: float = 0.0,
        temporal_penalty: float = 0.0,
        label_smoothing: float = 0.0,
        sampled_tokens: int | None = None,
        frequent_tokens: int = 4096,
    ) -> None:
        super().__init__()
        self.vocab_size, self.dropout, self.bidirectional = vocab_size, dropout, bidirectional
        self.input_dropout, self.output_dropout = input_dropout, output_dropout
        self.embedding_dropout = embedding_dropout
        self.activation_penalty, self.temporal_penalty = activation_penalty, temporal_penalty
        self.label_smoothing = label_smoothing
        self.sampled_tokens, self.frequent_tokens = sampled_tokens, frequent_tokens
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.recurrence = RecurrentLayers(
            cell,
            embedding_size,
            layer_sizes or hidden_size,
            num_layers,
            bidirectional,
            dropout,
            backend,
            layer_dropout=layer_dropout,
            weight_dropout=weight_dropout,
            residual=residual,
            layer_norm=layer_norm,
        )
        hidden_size = self.recurrence.hidden_sizes[-1]
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
        self.ngram_embeddings = nn.ModuleDict(
            {
                f"of_{name}": NgramEmbedding(ngram_embeddings, ngram_embedding_buckets, size, ngram_embedding_dropout)
                for name in self.objectives[:2]
                if ngram_embeddings
            }
        )
        self.ngram_counts = nn.ModuleDict(
            {
                f"of_{name}": CountedNgrams(ngram_counts, vocab_size, size)
                for name in self.objectives[:2]
                if ngram_counts is not None
            }
        )
        self.history = (
            max(*ngram_embeddings, (ngram_counts or 2) - 1, 1) - 1
        )  # K tokens that a state holds beside the stack's own
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

    def forward(
        self, tokens: Tensor, state: State | None = None, direction: Direction = "forward"
    ) -> tuple[Tensor, State]:
        """Read on: tokens (L, B), rows of equal length -> logits (L, B, V) of what comes after each, and the state.

        Args:
            direction: backward: tokens come in the order in which that stack reads them, last one first, and what
                comes after a token is the token before it.
        """
        (length, count), stack = tokens.shape, self.stack(direction)
        embedded = self.embedding(tokens)  # (L, B, E)
        if length == 1:
            states, end = stack.step(embedded[0], state)
        else:
            states, end = stack(embedded.flatten(0, 1), pack_rows(torch.full((count,), length)), state)
        before = NOTHING_BEFORE
        if self.history:
            place = torch.arange(length * count, device=tokens.device)
            lengths = torch.full((count,), length)
            before = self._look_back(direction, tokens, lengths, place // count, place % count, state)
        logits = self._logits(direction, self._project(direction, states, before.direct), before.history)
        return logits.unflatten(0, tokens.shape), end + before.state

    def read_prompts(self, tokens: Tensor, lengths: Tensor, direction: Direction = "forward") -> tuple[Tensor, State]:
        """Ragged prompts: tokens (L, B) as `forward` takes them, lengths (B,) on CPU, longest first -> logits (B, V)
        after each, state."""
        rows = pack_rows(lengths)
        states, end = self.stack(direction)(self.embedding(tokens[rows.time, rows.row]), rows)
        last, row = (lengths - 1).to(tokens.device), torch.arange(len(lengths), device=tokens.device)
        before = self._look_back(direction, tokens, lengths, last, row, None)
        projected = self._project(direction, states[rows.last], before.direct)
        return self._logits(direction, projected, before.history), end + before.state

    def stack(self, direction: Direction) -> RecurrentStack:
        """The layers that read in a direction."""
        stack = self.recurrence.stacks[0 if direction == "forward" else 1]
        assert isinstance(stack, RecurrentStack)
        return stack

    def load_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Take up the counts of each direction, `of_DIRECTION.NAME` as `count` names them."""
        for name, counted in self.ngram_counts.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): part for key, part in counts.items() if key.startswith(prefix)}
            assert isinstance(counted, CountedNgrams)
            counted.put(own)

    def _look_back(
        self, direction: Direction, tokens: Tensor, lengths: Tensor, time: Tensor, row: Tensor, state: State | None
    ) -> _Before:
        """What was read before, for those that go by more than the recurrence; of a model that has none, nothing.

        Args:
            tokens, lengths: (L, B) in the order in which they are read, (B,) how many of them are.
            time, row: (N,) the steps and rows up to and with which.
        """
        if not self.history:
            return NOTHING_BEFORE
        context = context_of(tokens, self.history, None if state is None else state[-1][0])  # (K + L, B)
        direct = history = None
        if self.ngram_embeddings:
            ngrams = self.ngram_embeddings[f"of_{direction}"]
            assert isinstance(ngrams, NgramEmbedding)
            direct = ngrams(context[self.history - ngrams.history :], time, row)
        if self.ngram_counts:
            history = history_at(context, self._counted(direction).history, time + self.history, row)
        return _Before(direct, history, ((history_after(context, self.history, lengths),),))

    def _project(self, objective: Objective, states: Tensor, direct: Tensor | None) -> Tensor:
        """What the output layer reads, (N, P)."""
        projected: Tensor = self.projections[f"of_{objective}"](states)
        return projected if direct is None else projected + direct

    def _logits(self, direction: Direction, states: Tensor, history: Tensor | None) -> Tensor:
        if isinstance(self.output, FullOutput) and history is None:
            logits: Tensor = self.output(states)
            return logits.float()
        return self.log_probabilities(direction, states, history)  # logits, too

    def nats(self, objective: Objective, events: Events) -> Tensor:
        """Negative log-likelihood of each target (N,), in nats, float32 at least; outside the graph."""
        return self._mixed(objective, events, self.output.nats(events.states, events.targets)).detach()

    def log_probabilities(self, objective: Objective, states: Tensor, history: Tensor | None) -> Tensor:
        """Natural log-probabilities (N, V) of every token at events with these states and history, float32."""
        found = self.output.log_probabilities(states)
        return found if history is None else self._counted(objective).log_probabilities(states, history, found)

    def _counted(self, objective: Objective) -> CountedNgrams:
        counted = self.ngram_counts[f"of_{objective}"]
        assert isinstance(counted, CountedNgrams)
        return counted

    def _mixed(self, objective: Objective, events: Events, nats: Tensor) -> Tensor:
        """Nats (N,) of the mixture, given the network's; its gate alone learns from them."""
        if events.history is None:
            return nats
        states, left_out = events.states.detach(), self.training
        shares, counted = self._counted(objective).mix(states, events.history, events.targets, left_out)
        return -torch.logsumexp(torch.cat([-nats.unsqueeze(1), counted], 1) + shares, 1)

    def read(self, tokens: Tensor, lengths: Tensor, state: State | None = None) -> EncodedBatch:
        """Read a batch and give each objective's states and targets.

        Args:
            tokens: (L, B) int64, rows longest first, each from its `<bos>` to its `<eos>`, or a stretch of a stream
                from the token before its first event on.
            lengths: (B,) int64 on CPU, non-increasing, >= 2.
            state: in which the forward stack begins; None: zeros.
        """
        return self._read(tokens, lengths, state, Lookups(self.embedding.weight, self.embedding.sparse))

    def _read(self, tokens: Tensor, lengths: Tensor, state: State | None, lookups: Lookups) -> EncodedBatch:
        places = align(lengths)
        device, rows = tokens.device, places.rows
        time, row = rows.time.to(device), rows.row.to(device)
        penalties = dict[Objective, Tensor]()
        states, end = self._run("forward", tokens[time, row], rows, lookups, penalties, state)
        before = self._look_back("forward", tokens, rows.lengths, time, row, state)
        targets = tokens[time + 1, row]
        events: dict[Objective, Events] = {
            "forward": Events(self._project("forward", states, before.direct), targets, before.history),
        }
        if self.bidirectional:
            back = places.read_back.to(device)
            states_back, _ = self._run("backward", tokens[back, row], rows, lookups, penalties)
            real = torch.arange(len(tokens), device=device).unsqueeze(1) < lengths.to(device)
            flipped = torch.where(real, tokens, -1).flip(0)  # behind a row's end there is nothing
            behind = self._look_back("backward", flipped, rows.lengths, len(tokens) - 1 - back, row, None)
            events["backward"] = Events(
                self._project("backward", states_back, behind.direct), tokens[back - 1, row], behind.history
            )
            left, right = places.fill_forward.to(device), places.fill_backward.to(device)
            sides = torch.cat([states.index_select(0, left), states_back.index_select(0, right)], 1)  # (M, 2H)
            direct = None
            if before.direct is not None and behind.direct is not None:
                direct = before.direct[left] + behind.direct[right]
            events["fill"] = Events(self._project("fill", sides, direct), targets[left])
        return EncodedBatch(events, end + before.state, penalties)

    def _run(
        self,
        direction: Direction,
        tokens: Tensor,
        rows: PackedRows,
        lookups: Lookups,
        penalties: dict[Objective, Tensor],
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Read packed tokens (N,) in one direction -> the states (N, H), dropped out, and the state at rows' ends."""
        embedded = drop_words(lookups(tokens), tokens, self.vocab_size, self.embedding_dropout, self.training)  # (N, E)
        embedded = self._drop(embedded, rows, self.input_dropout)
        states, end = self.stack(direction)(embedded, rows, state)
        dropped = self._drop(states, rows, self.output_dropout)
        if self.training and (self.activation_penalty or self.temporal_penalty):
            penalties[direction] = self._penalty(states, dropped, rows)
        return dropped, end

    def _drop(self, values: Tensor, rows: PackedRows, locked: float) -> Tensor:
        return drop_locked(drop(values, self.dropout, self.training), rows, locked, self.training)

    def _penalty(self, states: Tensor, dropped: Tensor, rows: PackedRows) -> Tensor:
        """Large states, and states that change from step to step, summed over the packed rows.

        alpha * mean_H(dropped**2) + beta * mean_H((h_t - h_{t-1})**2): Merity et al. 2017,
        https://arxiv.org/abs/1708.01009, with `activation_penalty` for alpha and `temporal_penalty` for beta.
        """
        total = self.activation_penalty * dropped.square().sum()
        if self.temporal_penalty and len(states) > rows.batch_sizes[0]:
            before = states.index_select(0, rows.previous().to(states.device))
            total = total + self.temporal_penalty * (states[rows.batch_sizes[0] :] - before).square().sum()
        return total / states.shape[1]

    def loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        weights: Mapping[Objective, float] | None = None,
        state: State | None = None,
    ) -> Losses:
        """Nats of each objective, and their weighted sum; arguments as `read`. Padding is never scored.

        With counts the nats are the mixture's; in the sum stand the network's own, too, by which it learns alone.

        Args:
            weights: of a nat of each objective in the total; 1 where left out.
        """
        lookups = Lookups(self.embedding.weight, self.embedding.sparse)
        events, end, penalties = self._read(tokens, lengths, state, lookups)
        states = torch.cat([part.states for part in events.values()])
        targets = torch.cat([part.targets for part in events.values()])
        sizes = [len(part.targets) for part in events.values()]
        each = {name: 1.0 if weights is None else weights[name] for name in events}
        of_events = torch.tensor(list(each.values())).repeat_interleave(torch.tensor(sizes)).to(states.device)
        if isinstance(self.output, FullOutput):
            tied = lookups.tied() if self.output.weight is self.embedding.weight else None
            smoothing = self.label_smoothing if self.training else 0.0
            sample = None
            if self.training and self.sampled_tokens is not None:
                sample = sample_vocabulary(targets, self.vocab_size, self.frequent_tokens, self.sampled_tokens)
            total, nats = self.output.loss(states, targets, of_events, tied, smoothing, sample)  # one product for all
        else:
            total, nats = self.output.loss(states, targets, of_events)
        for direction, penalty in penalties.items():
            total = total + each[direction] * penalty
        parts: dict[Objective, Loss] = {}
        for (objective, of_objective), own in zip(events.items(), nats.split(sizes), strict=True):
            mixed = self._mixed(objective, of_objective, own)
            if mixed is not own:
                total = total + each[objective] * mixed.sum()
            parts[objective] = Loss(mixed.detach().sum(), len(own))
        return Losses(total, parts, end)
