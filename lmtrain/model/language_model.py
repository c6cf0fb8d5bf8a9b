"""The language model: embedding, one or two recurrent stacks, output layer, and three objectives.

Shapes: B rows, L longest row, D directions, E embedding size, H hidden size, K tokens of n-gram history, M inner
tokens, N packed rows or events, P output size, V vocabulary.

A row is `<bos> t1 .. tn <eos>`. The forward stack reads it from the left and predicts the next token; the backward
stack reads it from the right and predicts the previous one. Each gives a true probability of the whole row. The
forward state before a token and the backward state after it together predict that token (fill). No state has ever
seen the token that it predicts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmtrain.model.directions import RecurrentLayers
from lmtrain.model.dropout import drop, drop_locked, drop_tokens
from lmtrain.model.embedding import Lookups
from lmtrain.model.ngrams.embedding import NgramEmbedding
from lmtrain.model.ngrams.history import History, NgramInputs, context_of, ngram_inputs
from lmtrain.model.ngrams.mixture import NgramMixture
from lmtrain.model.objectives import (
    Direction,
    EncodedBatch,
    Events,
    Layout,
    Losses,
    Objective,
    lay_out,
    state_penalty,
    weights_of_events,
)
from lmtrain.model.output import AdaptiveOutput, FullOutput, projection, sample_vocabulary
from lmtrain.model.packing import PackedRows, pack_rows
from lmtrain.model.recurrence import RecurrentStack
from lmtrain.model.states import ModelState, StackState


class LanguageModel(nn.Module):
    """A recurrent language model of one or two directions.

    Args:
        vocab_size: V, with the special tokens.
        embedding_size, hidden_size, num_layers: E, H and the number of recurrent layers in each direction.
        layer_sizes: H of each layer, in place of `hidden_size` and `num_layers`.
        cell: a name in `CELLS`.
        bidirectional: add the backward stack, which shares the embedding and the output layer.
        dropout: fraction of the values that is zeroed after the embedding, between layers and before the output.
        ngram_embeddings, ngram_embedding_buckets, ngram_embedding_dropout: for each `NgramEmbedding`.
        ngram_counts, recent_tokens: for `NgramMixture`; `load_counts` takes the counts.
        tie_weights: the output layer uses the embedding's weight; states are projected to its size.
        output: `full`, or `adaptive` for a large vocabulary (then not tied).
        input_dropout, output_dropout: fraction of the features after the embedding and before the output layer that is
            zeroed at all steps of a row.
        embedding_dropout: fraction of the vocabulary whose embeddings are zeroed in a batch.
        activation_penalty, temporal_penalty: as in `state_penalty`.
        label_smoothing: as in `FullOutput.loss`; only with `output="full"`.
        sampled_tokens, frequent_tokens: for `sample_vocabulary` in training; None: the loss is over all tokens.
        stack_options: residual, layer_norm, backend, layer_dropout, weight_dropout, for `RecurrentStack`.
    """

    history_size: int  # K; 0: the state keeps no tokens

    def __init__(
        self,
        vocab_size: int,
        *,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        layer_sizes: Sequence[int] | None = None,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        ngram_embeddings: Sequence[int] = (),
        ngram_embedding_buckets: int = 16384,
        ngram_counts: int | None = None,
        recent_tokens: int | None = None,
        tie_weights: bool = True,
        output: Literal["full", "adaptive"] = "full",
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        ngram_embedding_dropout: float = 0.0,
        activation_penalty: float = 0.0,
        temporal_penalty: float = 0.0,
        label_smoothing: float = 0.0,
        sampled_tokens: int | None = None,
        frequent_tokens: int = 4096,
        **stack_options: Any,
    ) -> None:
        super().__init__()
        self.vocab_size, self.dropout, self.bidirectional = vocab_size, dropout, bidirectional
        self.input_dropout, self.output_dropout = input_dropout, output_dropout
        self.embedding_dropout, self.label_smoothing = embedding_dropout, label_smoothing
        self.activation_penalty, self.temporal_penalty = activation_penalty, temporal_penalty
        self.sampled_tokens, self.frequent_tokens = sampled_tokens, frequent_tokens
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        sizes = layer_sizes or hidden_size
        self.recurrence = RecurrentLayers(
            cell, embedding_size, sizes, num_layers, bidirectional, dropout=dropout, **stack_options
        )
        hidden_size = self.recurrence.hidden_sizes[-1]
        size = embedding_size if tie_weights else hidden_size
        self.output = FullOutput(size, vocab_size) if output == "full" else AdaptiveOutput(size, vocab_size)
        self.projections = nn.ModuleDict(
            {f"of_{name}": projection(1 + (name == "fill"), hidden_size, size) for name in self.objectives}
        )
        self.ngram_embeddings, self.mixtures = nn.ModuleDict(), nn.ModuleDict()
        for name in self.objectives[:2]:
            if ngram_embeddings:
                self.ngram_embeddings[f"of_{name}"] = NgramEmbedding(
                    ngram_embeddings, ngram_embedding_buckets, size, ngram_embedding_dropout
                )
            if ngram_counts is not None or recent_tokens is not None:
                self.mixtures[f"of_{name}"] = NgramMixture(ngram_counts, recent_tokens, vocab_size, size)
        self.history_size = max(*ngram_embeddings, (ngram_counts or 2) - 1, recent_tokens or 1) - 1
        self.reset_parameters()
        if tie_weights:
            assert isinstance(self.output, FullOutput), "adaptive output layers have weights of their own"
            self.output.weight = self.embedding.weight

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The predictions that the model learns: next token; with two directions also previous token and blank."""
        return ("forward", "backward", "fill") if self.bidirectional else ("forward",)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with uniform embeddings and a zero output bias; other modules have set their own start values."""
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if isinstance(self.output, FullOutput):
            nn.init.zeros_(self.output.bias)

    def load_counts(
        self, counts: Mapping[str, Tensor], columns: Mapping[str, Tensor] | None = None, first_column: int = 0
    ) -> None:
        """Take the counts of each direction, named `of_DIRECTION.NAME` with the names that `count_ngrams` gives.

        Args:
            columns: for training on a stream, likewise named: what each of its columns alone has counted; or nothing.
            first_column: of those that this process reads.
        """
        for direction in self.objectives[: len(self.mixtures)]:
            prefix = f"of_{direction}."
            of_all, of_columns = (
                {key.removeprefix(prefix): part for key, part in (every or {}).items() if key.startswith(prefix)}
                for every in (counts, columns)
            )
            self._mixture(direction).load_counts(of_all)
            if of_columns:
                self._mixture(direction).load_columns(of_columns, first_column)

    def stack(self, direction: Direction) -> RecurrentStack:
        """Return the layers that read in a direction."""
        stack = self.recurrence.stacks[0 if direction == "forward" else 1]
        assert isinstance(stack, RecurrentStack)
        return stack

    def _mixture(self, objective: Objective) -> NgramMixture:
        mixture = self.mixtures[f"of_{objective}"]
        assert isinstance(mixture, NgramMixture)
        return mixture

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, direction: Direction = "forward"
    ) -> tuple[Tensor, ModelState]:
        """Read on in rows of equal length; return logits (L, B, V) of the token after each one, and the new state.

        Args:
            tokens: (L, B), in the order in which the direction reads them: the backward stack takes the last token of a
                text first, and what comes "after" a token is then the one before it in the text.
            state: the state after the tokens read before; None: nothing was read.
        """
        (length, count), stack = tokens.shape, self.stack(direction)
        layers = None if state is None else state.layers
        embedded = self.embedding(tokens)  # (L, B, E)
        if length == 1:
            states, end = stack.step(embedded[0], layers)
        else:
            states, end = stack(embedded.flatten(0, 1), pack_rows(torch.full((count,), length)), layers)
        ngrams = NgramInputs()
        if self.history_size:
            packed = torch.arange(length * count, device=tokens.device)
            lengths = torch.full_like(tokens[0], length)
            ngrams = self._ngram_inputs(direction, tokens, lengths, packed // count, packed % count, state)
        logits = self._logits(direction, self._project(direction, states, ngrams.vectors), ngrams.history)
        return logits.unflatten(0, tokens.shape), ModelState(end, ngrams.last)

    def read_prompts(
        self, tokens: Tensor, lengths: Tensor, direction: Direction = "forward"
    ) -> tuple[Tensor, ModelState]:
        """Read whole prompts of different lengths; return logits (B, V) of the token after each, and the state.

        Args:
            tokens, lengths: (L, B), ordered as in `forward`; (B,) int64 on CPU, non-increasing.
        """
        rows = pack_rows(lengths).to(tokens.device)
        states, end = self.stack(direction)(self.embedding(tokens[rows.time, rows.row]), rows)
        row = torch.arange(len(lengths), device=tokens.device)
        ngrams = self._ngram_inputs(direction, tokens, rows.lengths, rows.lengths - 1, row, None)
        projected = self._project(direction, states[rows.last], ngrams.vectors)
        return self._logits(direction, projected, ngrams.history), ModelState(end, ngrams.last)

    def _ngram_inputs(
        self,
        direction: Direction,
        tokens: Tensor | None,
        lengths: Tensor,
        time: Tensor | None,
        row: Tensor,
        state: ModelState | None,
    ) -> NgramInputs:
        """Return what n-grams add to the inputs of N events, as `ngram_inputs` says; nothing for a model without."""
        if not self.history_size or tokens is None or time is None:
            return NgramInputs()
        embedding = self.ngram_embeddings[f"of_{direction}"] if self.ngram_embeddings else None
        assert embedding is None or isinstance(embedding, NgramEmbedding)
        context = context_of(tokens, self.history_size, None if state is None else state.history)
        return ngram_inputs(context, self.history_size, lengths, time, row, embedding, bool(self.mixtures))

    def _project(self, objective: Objective, states: Tensor, ngram_vectors: Tensor | None) -> Tensor:
        """Project states (N, D*H), or (N, H) of one direction, to the input (N, P) of the output layer."""
        projected: Tensor = self.projections[f"of_{objective}"](states)
        return projected if ngram_vectors is None else projected + ngram_vectors

    def _logits(self, direction: Direction, projected: Tensor, history: History | None) -> Tensor:
        if isinstance(self.output, FullOutput) and history is None:
            logits: Tensor = self.output(projected)
            return logits.float()
        return self.log_probabilities(direction, projected, history)  # these are logits, too

    def nats(self, objective: Objective, events: Events) -> Tensor:
        """Return the negative log-likelihood of each target (N,) in nats, at least float32, without autograd."""
        with torch.no_grad():
            weights = torch.ones_like(events.targets, dtype=events.states.dtype)
            return self._mix(objective, events, self.output.loss(events.states, events.targets, weights).nats)

    def log_probabilities(self, objective: Objective, states: Tensor, history: History | None) -> Tensor:
        """Natural log-probabilities (N, V), float32, of every token for states (N, P) and the history of N events."""
        network = self.output.log_probabilities(states)
        return network if history is None else self._mixture(objective).log_probabilities(states, history, network)

    def _mix(self, objective: Objective, events: Events, nats: Tensor, layout: Layout | None = None) -> Tensor:
        """Nats (N,) of the mixture with n-grams, whose gradient only the gate gets; else `nats` itself. Given
        the layout of a batch to train on, the counts exclude what they learnt from it."""
        if events.history is None:
            return nats
        excluded = None
        if layout is not None:
            excluded = layout.rows.row if layout.order is None else layout.order[layout.rows.row]
        mixture = self._mixture(objective).mix(events.states.detach(), events.history, events.targets, excluded)
        return -torch.logsumexp(torch.cat([-nats.unsqueeze(1), mixture.log_estimates], 1) + mixture.log_weights, 1)

    def lay_out(
        self, tokens: Tensor, lengths: Tensor, order: Tensor | None = None, padded_steps: int | None = None
    ) -> Layout:
        """Work out on the CPU what `read` and `loss` need of a batch, and move it to the model's device in one copy.

        A thread may do this for the next batch while the present one is computed.

        Args:
            tokens: (L, B) int64, rows longest first, each from its `<bos>` to its `<eos>`, or a part of a stream that
                begins with the token before its first event.
            lengths: (B,) int64 on CPU, non-increasing, >= 2.
            order: (B,) int64 on CPU, the column whose state each row continues, see `CarriedState`.
            padded_steps: pad all rows to this number of steps, >= L - 1. The padding adds nothing to the loss, but the
                state at the end of a padded row has read it and is of no use. None: rows keep their lengths.
        """
        device = self.embedding.weight.device
        layout = lay_out(tokens.cpu(), lengths, order, self.bidirectional, bool(self.history_size), padded_steps)
        if device.type != "cpu" and isinstance(self.output, AdaptiveOutput):
            layout = layout._replace(clusters=self.output.sort_targets(layout.targets))
        return layout.to(device)

    def read(
        self,
        tokens: Tensor,
        lengths: Tensor,
        state: ModelState | None = None,
        layout: Layout | None = None,
        lookups: Lookups | None = None,
    ) -> EncodedBatch:
        """Read a batch and return each objective's states and targets.

        Args:
            tokens, lengths: as in `lay_out`.
            state: of the forward stack before the batch; None: nothing was read.
            layout: what `lay_out` returned; `tokens` and `lengths` are then ignored. None: `read` calls `lay_out`.
            lookups: the lookups of this batch, if the output layer shares them.
        """
        layout = self.lay_out(tokens, lengths) if layout is None else layout
        lookups = Lookups(self.embedding.weight, self.embedding.sparse) if lookups is None else lookups
        rows, targets = layout.rows, layout.targets.split(layout.sizes)
        layers = None if state is None else state.layers
        states, end, penalties = self._run("forward", layout.inputs, rows, lookups, layers)
        ngrams = self._ngram_inputs("forward", layout.tokens, rows.lengths, rows.time, rows.row, state)
        projected = self._project("forward", states, ngrams.vectors)
        events: dict[Objective, Events] = {"forward": Events(projected, targets[0], ngrams.history)}
        left, right = layout.fill_forward, layout.fill_backward
        if layout.backward_inputs is not None and left is not None and right is not None:
            backward_states, _, penalty = self._run("backward", layout.backward_inputs, rows, lookups)
            backward_ngrams = self._ngram_inputs(
                "backward", layout.flipped, rows.lengths, layout.backward_steps, rows.row, None
            )
            projected = self._project("backward", backward_states, backward_ngrams.vectors)
            events["backward"] = Events(projected, targets[1], backward_ngrams.history)
            sides = torch.cat([states.index_select(0, left), backward_states.index_select(0, right)], 1)  # (M, 2H)
            vectors = None
            if ngrams.vectors is not None and backward_ngrams.vectors is not None:
                vectors = ngrams.vectors[left] + backward_ngrams.vectors[right]
            events["fill"] = Events(self._project("fill", sides, vectors), targets[2])
            penalties |= penalty
        return EncodedBatch(events, ModelState(end, ngrams.last), penalties)

    def _run(
        self, direction: Direction, tokens: Tensor, rows: PackedRows, lookups: Lookups, state: StackState | None = None
    ) -> tuple[Tensor, StackState, dict[Objective, Tensor]]:
        """Run a stack on packed tokens (N,): states (N, H) after dropout, the state at the rows' ends, the penalty."""
        embedded = drop_tokens(
            lookups(tokens), tokens, self.vocab_size, self.embedding_dropout, self.training
        )  # (N, E)
        embedded = drop_locked(drop(embedded, self.dropout, self.training), rows, self.input_dropout, self.training)
        states, end = self.stack(direction)(embedded, rows, state)
        dropped = drop_locked(drop(states, self.dropout, self.training), rows, self.output_dropout, self.training)
        penalties: dict[Objective, Tensor] = {}
        if self.training and (self.activation_penalty or self.temporal_penalty):
            penalties[direction] = state_penalty(states, dropped, rows, self.activation_penalty, self.temporal_penalty)
        return dropped, end, penalties

    def loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        weights: Mapping[Objective, float | Tensor] | None = None,
        state: ModelState | None = None,
        layout: Layout | None = None,
    ) -> Losses:
        """Compute the nats of each objective and their weighted sum; padding is never scored.

        With a mixture the nats are those of the mixture. The weighted sum then also holds the network's own nats,
        from which alone the network learns. Given a layout, this only queues work for the device: it neither copies to
        it nor waits for it, unless the output layer samples tokens.

        Args:
            tokens, lengths, state, layout: as in `read`.
            weights: factor of each objective's nats in the sum, a number or a tensor () on the device; None: 1.
        """
        layout = self.lay_out(tokens, lengths) if layout is None else layout
        lookups = Lookups(self.embedding.weight, self.embedding.sparse)
        events, end, penalties = self.read(tokens, lengths, state, layout, lookups)
        states = torch.cat([part.states for part in events.values()])
        factors = {name: 1.0 if weights is None else weights[name] for name in events}
        event_weights = weights_of_events(factors, layout)
        if isinstance(self.output, FullOutput):
            tied = lookups.tied() if self.output.weight is self.embedding.weight else None
            smoothing = self.label_smoothing if self.training else 0.0
            sample = None
            if self.training and self.sampled_tokens is not None:
                sample = sample_vocabulary(
                    layout.cpu_targets, self.vocab_size, self.frequent_tokens, self.sampled_tokens, states.device
                )
            total, network_nats = self.output.loss(states, layout.targets, event_weights, tied, smoothing, sample)
        else:
            total, network_nats = self.output.loss(states, layout.targets, event_weights, layout.clusters)
        if layout.real is not None:
            network_nats = network_nats * layout.real
        for direction, penalty in penalties.items():
            total = total + factors[direction] * penalty
        nats: dict[Objective, Tensor] = {}
        for (objective, part), own_nats in zip(events.items(), network_nats.split(layout.sizes), strict=True):
            mixed = self._mix(objective, part, own_nats, layout if self.training else None)
            if mixed is not own_nats:
                total = total + factors[objective] * mixed.sum()
            nats[objective] = mixed.detach().sum()
        return Losses(total, nats, end)
