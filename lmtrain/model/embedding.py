"""Looking tokens up in a weight, with a gradient that costs no more of the vocabulary than it has to.

Shapes: V vocabulary, E embedding size, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Lookups:
    """The lookups of one pass over a batch, and the output layer's use of the same weight where the two are tied.

    The output layer's gradient covers every row of the weight, and is there first on the way back: the gradients of
    the tokens looked up are added to N of its rows, instead of to V zeros that are then added to it.

    Args:
        weight: (V, E).
        sparse: give the gradient as N rows; for an optimizer that leaves all other rows as they are.
    """

    def __init__(self, weight: Tensor, sparse: bool = False) -> None:
        self.weight, self.sparse = weight, sparse
        self.pending = 0  # lookups whose gradient is still to come
        self.gradient: Tensor | None = None  # of the output layer, (V, E)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The rows of the tokens (N,), (N, E)."""
        if self.sparse:
            return F.embedding(tokens, self.weight, sparse=True)
        self.pending += 1
        rows: Tensor = _Rows.apply(self.weight, tokens, self)  # type: ignore[no-untyped-call]
        return rows

    def tied(self) -> Tensor:
        """The weight for the output layer's use."""
        weight: Tensor = _Tied.apply(self.weight, self)  # type: ignore[no-untyped-call]
        return weight


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lookups: Lookups) -> Tensor:
        ctx.lookups = lookups
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.lookups.pending:
            ctx.lookups.gradient = gradient
        return gradient, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, lookups: Lookups) -> Tensor:
        ctx.lookups, ctx.shape = lookups, weight.shape
        ctx.save_for_backward(tokens)
        return weight.index_select(0, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_rows: Tensor) -> tuple[Tensor | None, None, None]:
        (tokens,), lookups = ctx.saved_tensors, ctx.lookups
        lookups.pending -= 1
        if lookups.gradient is None:
            return to_rows.new_zeros(ctx.shape).index_add_(0, tokens, to_rows), None, None
        lookups.gradient.index_add_(0, tokens, to_rows)
        if not lookups.pending:
            lookups.gradient = None  # the only other reference is autograd's, which then need not copy it
        return None, None, None
