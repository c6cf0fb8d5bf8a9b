"""Looking tokens up in the embedding, with a gradient that touches few rows of the vocabulary.

Shapes: E embedding size, N packed rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Lookups:
    """The lookups of one batch in a weight (V, E), and the output layer's use of the same weight where both are tied.

    The output layer's gradient covers every row of the weight, and the backward pass computes it first. So the
    lookups add their gradients to N of its rows; autograd would add them to V rows of zeros, and these to it.

    Args:
        sparse: give the gradient as N rows, for an optimizer that leaves all other rows unchanged.
    """

    def __init__(self, weight: Tensor, sparse: bool = False) -> None:
        self.weight, self.sparse = weight, sparse
        self.pending = 0  # lookups whose gradient is not yet computed
        self.gradient: Tensor | None = None  # (V, E) from the output layer

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (N, E) of tokens (N,)."""
        if self.sparse:
            return F.embedding(tokens, self.weight, sparse=True)
        self.pending += 1
        rows: Tensor = _Rows.apply(self.weight, tokens, self)  # type: ignore[no-untyped-call]
        return rows

    def tied(self) -> Tensor:
        """Return the weight (V, E) for the output layer."""
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
            lookups.gradient = None  # now only autograd refers to the gradient, so it need not copy it
        return None, None, None
