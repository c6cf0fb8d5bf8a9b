"""The history of each token: the last few tokens read before it, from which n-grams are made.

Shapes: B rows, L longest row, K tokens of n-gram history, N events, P output size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain.model.ngrams.embedding import NgramEmbedding


class History(NamedTuple):
    """What was read before each of N events, from which an `NgramMixture` takes as many tokens as it needs."""

    context: Tensor  # (K + L, B) from `context_of`
    time: Tensor  # (N,) step of the last token read before each event, counted from the start of `context`
    row: Tensor  # (N,)

    def last(self, size: int) -> Tensor:
        """Return ids + 1 (N, size) of the last tokens read, the last one last; 0 where there was none."""
        return history_at(self.context, size, self.time, self.row)


class NgramInputs(NamedTuple):
    """Inputs of the output layer from n-grams, beside the recurrent states; None for what the model does not have."""

    vectors: Tensor | None = None  # (N, P) of embedded n-grams, added to the projected states
    history: History | None = None  # for an `NgramMixture`
    last: Tensor | None = None  # (B, K) history at each row's end, which the model's state keeps


def context_of(tokens: Tensor, size: int, history: Tensor | None = None) -> Tensor:
    """Put the history before the tokens, (K + L, B): ids + 1, and 0 if nothing was read.

    Args:
        tokens: (L, B) ids, in the order in which they are read.
        size: K.
        history: (B, K) of the rows' last tokens, from `history_at`; None: nothing was read before.
    """
    if history is None:
        history = tokens.new_zeros(tokens.shape[1], size)
    return torch.cat([history.t(), tokens + 1])


def history_at(context: Tensor, size: int, time: Tensor, row: Tensor) -> Tensor:
    """Return the `size` tokens (N, size) up to each given step of the given rows; the step's own token is the last.

    Args:
        context: (K + L, B) from `context_of`, K >= size - 1.
        time, row: (N,) steps, counted from the start of `context`.
    """
    windows = context.t().contiguous().unfold(1, size, 1)  # (B, K + L - size + 1, size)
    return windows[row, time + 1 - size]


def ngram_inputs(
    context: Tensor,
    size: int,
    lengths: Tensor,
    time: Tensor,
    row: Tensor,
    embedding: NgramEmbedding | None,
    mixed: bool,
) -> NgramInputs:
    """Return what n-grams add to the inputs of N events.

    Args:
        context, size: (K + L, B) from `context_of`, and K.
        lengths: (B,) number of tokens that are read in each row.
        time, row: (N,) step and row of the last token read before each event.
        embedding: of the embedded n-grams, if there are any.
        mixed: whether there is an `NgramMixture`.
    """
    vectors = None if embedding is None else embedding(context[size - embedding.history_size :], time, row)
    history = History(context, time + size, row) if mixed else None
    rows = torch.arange(len(lengths), device=context.device)
    return NgramInputs(vectors, history, history_at(context, size, lengths + size - 1, rows))
