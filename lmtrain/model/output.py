"""The output layer: from states to the probabilities of the vocabulary's tokens, and the loss over them.

Shapes: D directions, H hidden size, N events, P output size, R rows of a block of events, S sampled tokens, V
vocabulary, W columns of a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmtrain.model.packing import move_together
from lmtrain.model.products import add_product, padded_rows, product_dtype, write_product

CHUNK = 4096  # columns of a chunk on CPU: large enough for fast products, small enough for the caches
BUFFER_BYTES = 256 << 20  # upper bound for the exponentials of a block of rows
CPU = torch.device("cpu")
SAFE = 1e30  # sums of exponentials between 1 / SAFE and SAFE need no shift
SAFE_LOGIT = 50.0  # nor does a row whose greatest logit is between -50 and 50: e**50 is 5e21


def projection(directions: int, hidden_size: int, output_size: int) -> nn.Module:
    """Build the module that maps states (N, D*H) to inputs (N, P) of the output layer: a hidden layer that
    joins two directions, or for one direction a projection if the sizes differ."""
    if directions == 2:
        join = nn.Linear(2 * hidden_size, hidden_size)
        return nn.Sequential(join, nn.Tanh(), nn.Linear(hidden_size, output_size, bias=False))
    return nn.Identity() if hidden_size == output_size else nn.Linear(hidden_size, output_size, bias=False)


class OutputLoss(NamedTuple):
    """The loss of N events."""

    total: Tensor  # () the weighted sum of the nats, to differentiate
    nats: Tensor  # (N,) of each target, at least float32, outside autograd's graph


class FullOutput(nn.Linear):
    """One logit for each of the V tokens; the weight (V, P) may be the embedding's."""

    def loss(
        self,
        states: Tensor,
        targets: Tensor,
        weights: Tensor,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        sample: Sample | None = None,
    ) -> OutputLoss:
        """Negative log-likelihood of each target, and their weighted sum, whose gradient is computed on the way.

        Args:
            states, targets, weights: (N, P), (N,) int64, (N,).
            weight: (V, P), used in place of the layer's own.
            label_smoothing: fraction of a target that is spread evenly over the vocabulary, in the sum but not in the
                nats (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
            sample: compute the softmax over these tokens only; the nats are then an estimate.
        """
        bias: Tensor = self.bias
        weight = self.weight if weight is None else weight
        if sample is not None:
            weight, targets = weight.index_select(0, sample.tokens), sample.targets
            bias = bias.index_select(0, sample.tokens) + sample.correction
        return _softmax_loss(states, weight, bias, targets, weights, label_smoothing)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Return natural log-probabilities (N, V) of every token for states (N, P), float32."""
        return F.log_softmax(self(states).float(), -1)


class Sample(NamedTuple):
    """The part of a vocabulary that represents the whole vocabulary in one step."""

    tokens: Tensor  # (S,) int64, ascending
    targets: Tensor  # (N,) index of each event's target in `tokens`
    correction: Tensor  # (S,) to add to the logits: minus the logarithm of a token's chance to be sampled


def sample_vocabulary(
    targets: Tensor, vocab_size: int, frequent: int, sampled: int, device: torch.device = CPU
) -> Sample:
    """Return a sample on a device: the first `frequent` tokens, the targets (N,), and about `sampled` others at random.

    The targets are on the CPU, and the sample is drawn there, so that its size is known without waiting for the device.

    The logits of the random tokens are raised by -log(their chance). The sum of exponentials over the sample is then an
    unbiased estimate of the sum over the vocabulary (importance sampling: Bengio and Senecal 2003,
    https://proceedings.mlr.press/r4/bengio03a.html; one sample for all events of a step: Jean et al. 2015,
    https://arxiv.org/abs/1412.2007). The frequent tokens and the targets, which make up most of the sum, are exact.
    """
    certain = torch.zeros(vocab_size, dtype=torch.bool)
    certain[:frequent] = True
    certain[targets] = True
    others = vocab_size - int(certain.sum())
    chance = min(1.0, sampled / max(1, others))
    drawn = ~certain & (torch.rand(vocab_size) < chance)
    in_sample = certain | drawn
    tokens = in_sample.nonzero().squeeze(1)
    index = in_sample.cumsum(0) - 1
    if device.type == "cpu":
        return Sample(tokens, index[targets], drawn[tokens] * -math.log(chance))
    tokens, targets, at_random = move_together([tokens, index[targets], drawn[tokens].long()], device)
    return Sample(tokens, targets, at_random * -math.log(chance))


class Clusters(NamedTuple):
    """Where the targets of N events lie in an adaptive output layer."""

    in_head: Tensor  # (N,) column of the head: the target itself if it is frequent, else that of its cluster
    inside: list[Tensor]  # for each cluster of rare tokens, the indices (any number,) of the events with a target in it


class AdaptiveOutput(nn.Module):
    """Adaptive softmax: frequent tokens in a short list, rare ones in clusters with smaller weights.

    Grave et al. 2017, https://arxiv.org/abs/1609.04309. The weights are those of `torch.nn.AdaptiveLogSoftmaxWithLoss`,
    which expects ids sorted by falling frequency, as in lmtrain's char and word vocabularies.
    """

    def __init__(self, output_size: int, vocab_size: int) -> None:
        super().__init__()
        cutoffs = sorted({max(1, vocab_size // 16), max(2, vocab_size // 4)})
        div_value = 4.0 if output_size >= 16 else 1.0  # the last cluster's states have size P / div_value**2
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(output_size, vocab_size, cutoffs, div_value, head_bias=True)

    def sort_targets(self, targets: Tensor) -> Clusters:
        """Find the cluster of each target (N,). The result's shapes depend on values, so on a device this waits."""
        cutoffs = self.clusters.cutoffs[:-1]
        cluster = torch.bucketize(targets, torch.tensor(cutoffs, device=targets.device), right=True)  # (N,) 0: short
        in_head = torch.where(cluster > 0, self.clusters.shortlist_size + cluster - 1, targets)
        inside = [(cluster == number).nonzero().squeeze(1) for number in range(1, len(cutoffs) + 1)]
        return Clusters(in_head, inside)

    def loss(
        self, states: Tensor, targets: Tensor, weights: Tensor, sorted_targets: Clusters | None = None
    ) -> OutputLoss:
        """As `FullOutput.loss`; a rare target costs the nats of its cluster plus its nats within the cluster.

        `sorted_targets` is what `sort_targets` returned for the targets; None: it is called here.
        """
        clusters = self.clusters
        in_head, rare_events = self.sort_targets(targets) if sorted_targets is None else sorted_targets
        total, nats = _softmax_loss(states, clusters.head.weight, clusters.head.bias, in_head, weights)
        tails = cast(list[tuple[nn.Module, nn.Linear]], clusters.tail)
        for cutoff, inside, (smaller, tail) in zip(clusters.cutoffs[:-1], rare_events, tails, strict=True):
            # an empty cluster is computed too: every weight then has a gradient for several processes to sum
            projected, in_tail = smaller(states.index_select(0, inside)), targets[inside] - cutoff
            tail_total, tail_nats = _softmax_loss(projected, tail.weight, None, in_tail, weights[inside])
            total, nats = total + tail_total, nats.index_add(0, inside, tail_nats)
        return OutputLoss(total, nats)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Return natural log-probabilities (N, V) of every token for states (N, P), float32."""
        with torch.autocast(states.device.type, enabled=False):
            result: Tensor = self.clusters.log_prob(states.to(self.clusters.head.weight.dtype))
        return result


def argmax(values: Tensor) -> Tensor:
    """Return the index of the first greatest value of each row, (N, V) -> (N,) int64, outside autograd. On CPU NumPy
    searches for it, since NumPy's search is vectorised and PyTorch's is not."""
    return values.argmax(-1) if values.device.type != "cpu" else torch.from_numpy(values.numpy().argmax(-1))


def _softmax_loss(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, smoothing: float = 0.0
) -> OutputLoss:
    differentiate = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    apply: Any = _SoftmaxLoss.apply
    return OutputLoss(*apply(states, weight, bias, targets, weights, smoothing, differentiate))


class _SoftmaxLoss(torch.autograd.Function):
    """`apply(states, weight, bias, targets, weights, smoothing, differentiate) -> total (), nats (N,)`.

    It never keeps a copy of all logits, least of all in float32. It takes one block of rows and one chunk of
    the vocabulary at a time, computes their logits, and overwrites them with their exponentials e, in the dtype of
    products. Once a row's sum s of exponentials is known, the gradient

        d total / d logit = weight * (e - s [target]) / s

    ([target] is 1 at the target, else 0) needs only two more passes over the vocabulary, the products for the gradients
    of states and weights. At the target, e - s is minus the sum of all other exponentials. The factor weight / s is
    applied to the small operand of each product. Label smoothing adds a gradient that is the same for every token; see
    `_smooth`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(torch.promote_types(states.dtype, torch.float32))  # not rounded to bf16
            events = len(states)
            if dtype != states.dtype:
                padding = padded_rows(events) - events  # padding has weight 0
                states, targets = F.pad(states, (0, 0, 0, padding)), F.pad(targets, (0, padding))
                weights = F.pad(weights, (0, padding))
            nats = torch.empty_like(states[:, 0])
            gradients = [torch.empty_like(part) for part in (states, weight, weight[:, 0])] if differentiate else []
            rows = max(1, BUFFER_BYTES // (dtype.itemsize * len(weight)))
            chunks = _Chunks(weight.to(dtype), None if bias is None else bias.to(dtype))
            for start in range(0, max(1, len(states)), rows):
                block = slice(start, start + rows)
                inputs, in_block = states[block], targets[block]  # (R, P), (R,)
                exponentials, others, of_target, total = chunks.exponentials(inputs, in_block, keep=differentiate)
                nats[block] = total.log() - of_target
                if not differentiate:
                    continue
                chunks.write_targets(exponentials, in_block, smoothing * total - others)
                factor = weights[block].to(total.dtype) / total  # (R,)
                gradients[0][block] = chunks.times_weight(exponentials, inputs).mul_(factor.unsqueeze(1))
                chunks.weight_gradient(exponentials, inputs, factor, gradients[1], gradients[2], add=start > 0)
        states, targets, weights, nats = (part[:events] for part in (states, targets, weights, nats))
        if differentiate:
            gradients[0] = gradients[0][:events]
        total_nats = (nats * weights).sum()
        if smoothing:
            total_nats += smoothing * _smooth(states, weight, bias, targets, weights, smoothing, gradients)
        ctx.save_for_backward(*gradients)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(nats)
        return total_nats, nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_total: Tensor, to_nats: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if to_total.device.type != "cpu" or float(to_total) != 1:
            gradients = [gradient * to_total for gradient in gradients]
        to_states, to_weight, to_bias = gradients
        return to_states, to_weight, to_bias if ctx.has_bias else None, None, None, None, None


def _smooth(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    fraction: float,
    gradients: Sequence[Tensor],
) -> Tensor:
    """The weighted sum of each target's logit minus the mean logit, (); adds the mean's part to `gradients`.

    With a fraction e of the target spread out, an event costs nats + e * (logit of the target - mean logit).
    """
    mean_weight = weight.sum(0) / len(weight)  # (P,)
    difference = (states * (weight.index_select(0, targets) - mean_weight)).sum(1)  # (N,)
    if bias is not None:
        difference += bias.index_select(0, targets) - bias.mean()
    if gradients:
        to_states, to_weight, to_bias = gradients
        to_states.sub_(torch.outer(fraction * weights, mean_weight))
        to_weight.sub_(weights @ states * (fraction / len(weight)))
        to_bias.sub_(weights.sum() * (fraction / len(weight)))
    return (difference * weights).sum()


class _Chunks:
    """A vocabulary's weight (V, P) and bias (V,), in the dtype of products, cut into chunks of W tokens."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        size = CHUNK if weight.device.type == "cpu" else len(weight)
        self.weights = weight.split(size)  # (W, P) each
        self.biases = [None] * len(self.weights) if bias is None else bias.split(size)
        self.starts = range(0, len(weight), size)
        self.dtype = weight.dtype

    def exponentials(self, inputs: Tensor, targets: Tensor, keep: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The exponentials (R, W) of each chunk, 0 at the targets (an empty list unless `keep`); their sum over the
        vocabulary (R,); the targets' logits (R,); the sum with the targets' exponentials (R,).

        Logits are shifted by their row's greatest one where a sum would leave the range of floats. On the CPU the sums
        themselves show that. A program would have to wait for a device's sums, so there the greatest logits decide.
        """
        rounded = inputs.to(self.dtype)
        kept, others, of_target = self._exponentials(rounded, inputs.dtype, targets, None, keep)
        total = others + of_target.exp()
        if rounded.device.type == "cpu" and not bool(((total > 1 / SAFE) & (total < SAFE)).all()):
            tops = [self._logits(rounded, chunk).amax(1) for chunk in range(len(self.weights))]
            shift = torch.stack(tops).amax(0)  # (R,)
            kept, others, of_target = self._exponentials(rounded, inputs.dtype, targets, shift, keep)
            total = others + of_target.exp()
        return kept, others, of_target, total

    def _exponentials(
        self, rounded: Tensor, exact: torch.dtype, targets: Tensor, shift: Tensor | None, keep: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        kept = []
        others, of_target = torch.zeros_like(rounded[:, 0], dtype=exact), torch.zeros_like(rounded[:, 0], dtype=exact)
        for chunk, (start, weight) in enumerate(zip(self.starts, self.weights, strict=True)):
            logits = self._logits(rounded, chunk)  # (R, W)
            if logits.device.type != "cpu":  # the only chunk
                top = logits.amax(1, keepdim=True)
                logits.sub_(torch.where(top.abs() > SAFE_LOGIT, top, 0))
            elif shift is not None:
                logits.sub_(shift.unsqueeze(1))
            inside, column = self._columns(targets, start, len(weight))
            at_column = logits.gather(1, column)
            of_target = torch.where(inside, at_column.squeeze(1).to(exact), of_target)
            # the target is summed apart: when it is nearly certain, little is left for the others
            logits.scatter_(1, column, at_column.masked_fill(inside.unsqueeze(1), -torch.inf))
            others += _sum(logits.exp_(), exact)
            if keep:
                kept.append(logits)
        return kept, others, of_target

    @staticmethod
    def _columns(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Which targets lie in a chunk (R,), and the column of each (R, 1), which is arbitrary for the others."""
        column = targets - start
        return (column >= 0) & (column < size), column.clamp(0, size - 1).unsqueeze(1)

    def _logits(self, rounded: Tensor, chunk: int) -> Tensor:
        bias, weight = self.biases[chunk], self.weights[chunk].t()
        return rounded @ weight if bias is None else torch.addmm(bias, rounded, weight)

    def write_targets(self, exponentials: Sequence[Tensor], targets: Tensor, values: Tensor) -> None:
        """Write a value (R,) at the column of each row's target."""
        for start, part in zip(self.starts, exponentials, strict=True):
            inside, column = self._columns(targets, start, part.shape[1])
            written = torch.where(inside.unsqueeze(1), values.to(part.dtype).unsqueeze(1), part.gather(1, column))
            part.scatter_(1, column, written)

    def times_weight(self, exponentials: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the sum over chunks of exponentials @ weight, (R, P) in the dtype of `like`."""
        total = torch.zeros_like(like)
        for part, weight in zip(exponentials, self.weights, strict=True):
            add_product(total, part, weight)
        return total

    def weight_gradient(
        self, parts: Sequence[Tensor], inputs: Tensor, factor: Tensor, to_weight: Tensor, to_bias: Tensor, add: bool
    ) -> None:
        """Write to (V, P) and (V,), or add there, parts.T @ (factor * inputs) and parts.T @ factor, of parts (R, W)."""
        factored = (inputs * factor.unsqueeze(1)).to(self.dtype)
        for start, part in zip(self.starts, parts, strict=True):
            block = slice(start, start + part.shape[1])
            write = add_product if add else write_product
            write(to_weight[block], part.t(), factored)
            write(to_bias[block].unsqueeze(1), part.t(), factor.to(self.dtype).unsqueeze(1))


def _sum(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum (R,) of each row of `part` (R, W), added up in `dtype`."""
    if part.dtype == dtype:
        return part.sum(1)
    # PyTorch would first copy a whole bf16 tensor to float32. Over 64 columns it keeps the sum in float32 and rounds
    # only the result; the sums of many such groups together lose little.
    whole = part.shape[1] // 64 * 64
    groups: Tensor = part[:, :whole].unflatten(1, (-1, 64)).sum(2)  # (R, W / 64)
    return groups.sum(1, dtype=dtype) + part[:, whole:].sum(1, dtype=dtype)
