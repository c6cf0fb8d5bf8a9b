"""The history of each token: the last few tokens read before it, from which n-grams are made.

Shapes: B rows, L longest row, K tokens of n-gram history, N events, P output size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class NgramInputs(NamedTuple):
    """Inputs of the output layer from n-grams, beside the recurrent states; None for what the model does not have."""

    vectors: Tensor | None = None  # (N, P) of embedded n-grams, added to the projected states
    history: Tensor | None = None  # (N, K) for counted n-grams
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
    back = torch.arange(1 - size, 1, device=context.device)
    return context[time.unsqueeze(1) + back, row.unsqueeze(1)]
