"""Muon: momentum whose steps are made orthogonal, for the matrices of the recurrence.

Shapes: a matrix (m, n).

PyTorch has this optimizer (`torch.optim.Muon`). It computes in bf16 on every machine, which is three times as slow
if the processor has no bf16, and it iterates on the matrix itself. This one iterates on the smaller of the two
Gram matrices X'X and XX': a quarter of the size where an LSTM's four gates stand above each other.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

ITERATIONS = 3  # PyTorch makes five; the last two change no figure here and take time
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315  # steep at zero, and near 1 elsewhere


class Muon(Optimizer):
    """Nesterov momentum whose step is replaced by the nearest matrix with equal singular values.

    So a step moves a matrix by the same amount in every direction, even in those in which the gradient is small.
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Args:
        groups: parameter groups of matrices (m, n).
        lr: length of a step along each direction; times sqrt(m / n) for a matrix that is taller than wide.
        momentum: the factor by which each step multiplies the average of earlier gradients.
        weight_decay: the fraction of a weight that a step with a learning rate of 1 would remove.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                moved = orthogonalised(matrix.grad.lerp(mean, momentum))
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(moved, alpha=-lr * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U V, (m, n), for a matrix (m, n) with the singular value decomposition U S V.

    Its singular values are between 0.6 and 1.2, except for the smallest, which grow some 40 times. An odd polynomial of
    X, applied repeatedly, drives singular values to 1: X <- a X + b X X'X + c X (X'X)^2. Every factor is a polynomial
    of X'X, so the factors commute, and all of them can be computed from X'X alone:

        P_k = a + b A_k + c A_k^2,   A_(k+1) = P_k A_k P_k,   A_0 = X'X,   result = X P_0 P_1 P_2
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    square = matrix.t() @ matrix if tall else matrix @ matrix.t()
    trace = square.diagonal().sum().clamp(min=torch.finfo(matrix.dtype).tiny)  # bounds the largest singular value
    square = square / trace
    product = None
    for iteration in range(ITERATIONS):
        factor = torch.addmm(square, square, square, beta=CUBIC, alpha=QUINTIC)
        factor.diagonal().add_(LINEAR)
        product = factor if product is None else product @ factor
        if iteration + 1 < ITERATIONS:
            square = factor @ (factor @ square)
    assert product is not None
    result: Tensor = (matrix @ product if tall else product @ matrix) / trace.sqrt()
    return result
