"""The last few tokens read before each place.

Shapes: B rows, L longest row, K tokens of history, N events.
"""

from __future__ import annotations

import torch
from torch import Tensor


def context_of(tokens: Tensor, size: int, history: Tensor | None = None) -> Tensor:
    """What has been read up to each token, (K + L, B): ids + 1, and 0 where there was nothing.

    Args:
        tokens: (L, B) ids, in the order in which they are read.
        size: K.
        history: (B, K), as `history_after` gives it; None: nothing.
    """
    if history is None:
        history = tokens.new_zeros(tokens.shape[1], size)
    return torch.cat([history.t(), tokens + 1])


def history_after(context: Tensor, size: int, lengths: Tensor) -> Tensor:
    """The last K tokens of rows of which `lengths` (B,) tokens have been read, (B, K)."""
    steps = torch.arange(size, device=context.device).unsqueeze(1)
    return context.gather(0, lengths.to(context.device) + steps).t().contiguous()


def history_at(context: Tensor, size: int, time: Tensor, row: Tensor) -> Tensor:
    """The last `size` tokens read up to and with the given steps of the given rows, (N, size); the last one last.

    Args:
        context: (K + L, B) as `context_of` has it, K >= size - 1.
        time, row: (N,) steps counted from the front of `context`.
    """
    back = torch.arange(1 - size, 1, device=context.device)
    return context[time.unsqueeze(1) + back, row.unsqueeze(1)]
