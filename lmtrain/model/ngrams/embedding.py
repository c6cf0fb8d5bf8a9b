"""The last few tokens read, and direct connections from them to the output layer, around the recurrence.

Shapes: B rows, L longest row, P output size, K tokens of history, G orders, N events.

A recurrent layer takes long to learn what an n-gram model knows after one look: what follows these three tokens. A
vector for each n-gram, added to what the output layer reads of the state, leaves it to learn the rest. Mikolov et al.
2011 ("RNNME", https://doi.org/10.1109/ASRU.2011.6163930) connect hashed n-grams with every token of the vocabulary;
here it is vectors that the output layer multiplies, so that a large vocabulary takes no more of them. N-grams that are
hashed to one vector share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmtrain.model.dropout import drop

PRIME, FACTOR = 2**31 - 1, 1_000_003
MIX = 2_654_435_761  # Knuth's multiplicative hash: all of a product of 31 and 32 bits fits 63


class NgramEmbedding(nn.Module):
    """Vectors of hashed n-grams, summed over the orders; zeros at the start. Gradients are sparse.

    Args:
        orders: tokens in the n-grams, each >= 2.
        buckets: vectors of each order.
        size: P.
        dropout: share of the vectors left out in training, each order and token by itself.
    """

    def __init__(self, orders: Sequence[int], buckets: int, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.orders, self.buckets = tuple(orders), buckets
        self.history = max(self.orders) - 1  # K
        self.weight = nn.Parameter(torch.zeros(len(self.orders) * buckets, size))

    def forward(self, context: Tensor, time: Tensor, row: Tensor) -> Tensor:
        """The vectors (N, P) of the n-grams that end at the given steps of the given rows.

        Args:
            context: (K + L, B), as `context_of` gives it with this K.
            time, row: (N,) steps counted without the history.
        """
        buckets = self._buckets(context)[time, row]  # (N, G)
        vectors = F.embedding(buckets, self.weight, sparse=True)  # (N, G, P)
        kept = drop(vectors.new_ones(buckets.shape), self.dropout, self.training)
        return (vectors * kept.unsqueeze(2)).sum(1) if self.training and self.dropout else vectors.sum(1)

    def _buckets(self, context: Tensor) -> Tensor:
        """The row of the weight for each n-gram that ends at each token, (L, B, G)."""
        length = len(context) - self.history
        hashed, found = torch.zeros_like(context[self.history :]), list[Tensor]()
        for back in range(self.history + 1):
            start = self.history - back
            hashed = (hashed * FACTOR + context[start : start + length]) % PRIME
            if back + 1 in self.orders:
                found.append((hashed * MIX >> 16) % self.buckets + len(found) * self.buckets)
        return torch.stack(found, -1)
