"""The recent tokens as an estimate of the next one: what was read comes again, most of all after the same tokens.

Shapes: A classes of age, B rows, L longest row, M longest match, N events, Q occurrences, R recent tokens, V
vocabulary.

Kuhn and De Mori 1990 (https://doi.org/10.1109/34.56193) mix a model with the frequencies of the last few hundred
tokens. Here each of these tokens has a weight of its own, which is learnt: by its age, and by how many of the tokens
before it are those that were read last, so that what followed them before is likelier to follow them again. The ages
1, 2 to 3, 4 to 7 and so on share one weight each.

So all that an estimate needs is how many recent tokens there are of each match and age, and how many of them are the
target. Few match at all, and these are found by sorting, without looking at each of the N * R pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmtrain.model.ngrams.history import History

LONGEST_MATCH = 5  # M
AGES = 13  # of which a run has those that its R has


class _Occurrences(NamedTuple):
    """Where in its recent tokens each event has a wanted token; Q of them in all. A place is one in the text, which is
    the context's rows one after the other."""

    event: Tensor  # (Q,)
    last: Tensor  # (Q,) place of the event's newest recent token
    back: Tensor  # (Q,) how far before it the occurrence stands: its age is one more


class RecentTokens(nn.Module):
    """Weights for the recent tokens: a softmax over them and over an even guess, which counts as one more token.

    Args:
        size, vocab_size: R, more than M; V.

    Attributes:
        features: number of features for the gate.
    """

    ages: Tensor  # (R,) int64: the class of each age from 1 on

    def __init__(self, size: int, vocab_size: int) -> None:
        super().__init__()
        self.size, self.vocab_size, self.features = size, vocab_size, LONGEST_MATCH + 1
        self.of_match = nn.Parameter(torch.tensor([float(match) for match in range(LONGEST_MATCH + 1)]))
        self.of_age = nn.Parameter(torch.zeros(AGES))
        ages = [age.bit_length() - 1 for age in range(1, size + 1)]  # the whole part of the logarithm to base 2
        self.register_buffer("ages", torch.tensor(ages), persistent=False)

    def estimate(self, history: History, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate (N,) of each target (N,), and features (N, M + 1) for the gate: the logarithms of how
        many recent tokens match how far. The context of the history holds R - 1 tokens or more before its first step.

        A GPU looks at all N * R pairs: it is fast at that, and to find the few would make the program wait for it.
        """
        if targets.device.type != "cpu":
            recent = history.last(self.size)
            each, features = self._weights(recent)
            same = recent == targets.unsqueeze(1) + 1
            return each[:, 0] / self.vocab_size + (each[:, 1:] * same).sum(1), features
        with torch.no_grad():
            all_counts, of_target = self._count(history, targets)
        with torch.autocast(targets.device.type, enabled=False):
            # the even guess counts as exp(0); the exponents are shifted so that none overflows
            scores = self.of_match.unsqueeze(1) + self.of_age
            shift = scores.detach().max().clamp(min=0)
            weights, even = (scores - shift).exp().flatten(), (-shift).exp()
            estimate = (even / self.vocab_size + of_target.flatten(1) @ weights) / (
                even + all_counts.flatten(1) @ weights
            )
        matches = all_counts.sum(2).flip(1).cumsum(1).flip(1)  # (N, M + 1): of this match or a longer one
        return estimate, matches.log1p()

    def _count(self, history: History, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Count the recent tokens of each event by match and age, (N, M + 1, A), and those that are the target."""
        context = history.context.t().contiguous()  # (B, R - 1 or more + L)
        text, width = context.flatten(), context.shape[1]
        events, last = torch.arange(len(targets), device=text.device), history.row * width + history.time
        first = last - self.size + 1
        # by row, then by token, then by place: an occurrence of a token in a stretch of a row is found by bisection
        row = torch.arange(len(context), device=text.device).unsqueeze(1) * (self.vocab_size + 1)
        keys, _ = ((context + row).flatten() * len(text) + torch.arange(len(text), device=text.device)).sort()

        def occurrences(tokens: Tensor, end: Tensor) -> _Occurrences:
            """Those of the tokens (N,) from `first` to before `end` (N,)."""
            wanted = (history.row * (self.vocab_size + 1) + tokens) * len(text)
            begin, stop = (torch.searchsorted(keys, wanted + border) for border in (first, end))
            count = stop - begin
            event = torch.repeat_interleave(events, count)
            index = torch.arange(len(event), device=text.device) + (begin - count.cumsum(0) + count)[event]
            newest = last[event]
            return _Occurrences(event, newest, newest - keys[index] % len(text))

        def by_match_and_age(found: _Occurrences) -> Tensor:
            """Count the recent tokens at the found places."""
            index = (found.event * (LONGEST_MATCH + 1) + self._match(text, found)) * AGES + self.ages[found.back]
            counts = torch.bincount(index, minlength=len(targets) * (LONGEST_MATCH + 1) * AGES)
            return counts.view(len(targets), LONGEST_MATCH + 1, AGES).to(self.of_match.dtype)

        # a token behind an earlier occurrence of the last one matches; all other recent tokens do not
        before = occurrences(text[last], last)
        counts = by_match_and_age(before._replace(back=before.back - 1))
        read = (last + 1 - history.row * width - (context == 0).sum(1)[history.row]).clamp(max=self.size)  # (N,)
        youngest = 2 ** torch.arange(AGES, device=text.device)  # of each class
        counts[:, 0] = (read.unsqueeze(1) + 1 - youngest).clamp(min=0).minimum(youngest) - counts[:, 1:].sum(1)
        return counts, by_match_and_age(occurrences(targets + 1, last + 1))

    def _match(self, text: Tensor, found: _Occurrences) -> Tensor:
        """Return for each occurrence (Q,) how many tokens before it are those up to the last one, at most M; only
        recent tokens are compared."""
        match, going = torch.zeros_like(found.back), None
        last, back = found.last, found.back
        for length in range(1, LONGEST_MATCH + 1):
            token = text[last + 1 - length]
            same = (back + length < self.size) & (token == text[(last - back - length).clamp(min=0)]) & (token > 0)
            kept = same.nonzero().squeeze(1)  # fewer and fewer
            going = kept if going is None else going[kept]
            last, back = last[kept], back[kept]
            match[going] = length
        return match

    def estimates(self, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate (N, V) of every token, and the features (N, M + 1) as `estimate` does, from ids + 1
        (N, R) of the recent tokens, the last one last, and 0 where there was none."""
        weights, features = self._weights(recent)
        even = (weights[:, :1] / self.vocab_size).expand(-1, self.vocab_size)
        return even.scatter_add(1, (recent - 1).clamp(min=0), weights[:, 1:]), features

    def _weights(self, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (N, 1 + R) of the even guess and of each recent token (N, R), and the features."""
        going = recent > 0
        match, features = torch.zeros_like(recent), [going.sum(1)]
        for back in range(1, LONGEST_MATCH + 1):
            last = recent[:, -back].unsqueeze(1)
            going[:, :back] = False  # the first tokens have no such tokens before them here
            going[:, back:] &= (recent[:, :-back] == last) & (last > 0)
            match += going
            features.append(going.sum(1))
        scores = (self.of_match[match] + self.of_age[self.ages.flip(0)]).masked_fill(recent == 0, -torch.inf)
        weights = torch.softmax(F.pad(scores, (1, 0)), 1)
        return weights, torch.stack(features, 1).to(weights.dtype).log1p()
