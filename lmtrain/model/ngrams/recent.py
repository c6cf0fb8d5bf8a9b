"""The recent tokens as an estimate of the next one: what was read comes again, most of all after the same tokens.

Shapes: M longest match, N events, R recent tokens, V vocabulary.

Kuhn and De Mori 1990 (https://doi.org/10.1109/34.56193) mix a model with the frequencies of the last few hundred
tokens. Here each of these tokens has a weight of its own, which is learnt: by its age, and by how many of the tokens
before it are those that were read last, so that what followed them before is likelier to follow them again.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LONGEST_MATCH = 5  # M
OLDEST = 12  # ages are told apart by their logarithm to base 2


class RecentTokens(nn.Module):
    """Weights for the recent tokens: a softmax over them and over an even guess, which counts as one more token.

    Args:
        size, vocab_size: R, more than M; V.

    Attributes:
        features: number of features for the gate.
    """

    ages: Tensor  # (R,) int64

    def __init__(self, size: int, vocab_size: int) -> None:
        super().__init__()
        self.size, self.vocab_size, self.features = size, vocab_size, LONGEST_MATCH + 1
        self.of_match = nn.Parameter(torch.arange(LONGEST_MATCH + 1, dtype=torch.float32))
        self.of_age = nn.Parameter(torch.zeros(OLDEST + 1))
        ages = torch.arange(size, 0, -1, dtype=torch.float32).log2().long().clamp(max=OLDEST)
        self.register_buffer("ages", ages, persistent=False)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (N, 1 + R) of an even guess and of each recent token, and features (N, M + 1): the
        logarithms of how many tokens match how far.

        Args:
            history: (N, R or more) ids + 1 of the last tokens read, the last one last; 0 where there was none.
        """
        recent = history[:, -self.size :].int()
        going = recent > 0
        match, features = going.new_zeros(going.shape, dtype=torch.uint8), [going.sum(1)]
        for back in range(1, LONGEST_MATCH + 1):
            last = recent[:, -back].unsqueeze(1)
            going[:, :back] = False  # the first tokens have no such tokens before them here
            going[:, back:] &= (recent[:, :-back] == last) & (last > 0)
            match += going
            features.append(going.sum(1))
        of_match = self.of_match.index_select(0, match.view(-1).int()).view(match.shape)
        scores = (of_match + self.of_age[self.ages]).masked_fill(recent == 0, -torch.inf)
        weights = torch.softmax(F.pad(scores, (1, 0)), 1)
        return weights, torch.stack(features, 1).to(weights.dtype).log1p()

    def estimate(self, weights: Tensor, history: Tensor, targets: Tensor) -> Tensor:
        """Return the estimate (N,) of each target (N,), from the weights that `forward` returned."""
        same = history[:, -self.size :] == targets.unsqueeze(1) + 1
        return weights[:, 0] / self.vocab_size + (weights[:, 1:] * same).sum(1)

    def estimates(self, weights: Tensor, history: Tensor) -> Tensor:
        """Return the estimate (N, V) of every token."""
        even = (weights[:, :1] / self.vocab_size).expand(-1, self.vocab_size)
        return even.scatter_add(1, (history[:, -self.size :] - 1).clamp(min=0), weights[:, 1:])
