"""Embedded n-grams: vectors of the last few tokens, added to what the output layer reads, around the recurrence.

Shapes: B rows, L longest row, K tokens of n-gram history, N events, O orders, P output size.

A recurrent layer learns slowly what an n-gram model learns in one pass: which token follows three given tokens. A
vector for each n-gram, added to the projected state, leaves the rest to the recurrence. Mikolov et al. 2011 ("RNNME",
https://doi.org/10.1109/ASRU.2011.6163930) connect hashed n-grams with every token of the vocabulary; here the output
layer multiplies the vectors, so that a large vocabulary needs no more vectors. N-grams that are hashed to one
vector share it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmtrain.model.dropout import drop

PRIME, FACTOR = 2**31 - 1, 1_000_003
MIX = 2_654_435_761  # Knuth's multiplicative hash: every product of 31 and 32 bits fits into 63


class NgramEmbedding(nn.Module):
    """Vectors of hashed n-grams, summed over the orders. They start as zeros, and their gradients are sparse.

    Args:
        orders: number of tokens in the n-grams, >= 2 each.
        buckets: number of vectors for each order.
        size: P.
        dropout: fraction of the vectors that is left out in training, drawn for each order and token.
    """

    def __init__(self, orders: Sequence[int], buckets: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.orders, self.buckets = tuple(orders), buckets
        self.history_size = max(self.orders) - 1  # K
        self.weight = nn.Parameter(torch.zeros(len(self.orders) * buckets, size))

    def forward(self, context: Tensor, time: Tensor, row: Tensor) -> Tensor:
        """Return the summed vectors (N, P) of the n-grams that end at the given steps of the given rows.

        Args:
            context: (K + L, B) from `context_of` with this K.
            time, row: (N,) steps, counted without the history.
        """
        buckets = self._buckets(context)[time, row]  # (N, O)
        vectors = F.embedding(buckets, self.weight, sparse=True)  # (N, O, P)
        kept = drop(vectors.new_ones(buckets.shape), self.dropout, self.training)
        return (vectors * kept.unsqueeze(2)).sum(1) if self.training and self.dropout else vectors.sum(1)

    def _buckets(self, context: Tensor) -> Tensor:
        """The row of the weight for each n-gram that ends at each token, (L, B, O)."""
        length = len(context) - self.history_size
        hashed, buckets = torch.zeros_like(context[self.history_size :]), list[Tensor]()
        for back in range(self.history_size + 1):
            start = self.history_size - back
            hashed = (hashed * FACTOR + context[start : start + length]) % PRIME
            if back + 1 in self.orders:
                buckets.append((hashed * MIX >> 16) % self.buckets + len(buckets) * self.buckets)
        return torch.stack(buckets, -1)
