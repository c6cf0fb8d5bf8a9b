"""The output layer: from a state to the probabilities of the vocabulary's tokens, and the loss over it.

Shapes: N events, P output size, V vocabulary, C columns of a chunk of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmtrain.model.products import add_product, product_dtype, room_for, write_product

CHUNK = 4096  # columns of a chunk on CPU: large enough for fast products, small enough for the caches
BUFFER_BYTES = 256 << 20  # at most, for the exponentials of a block of rows
SAFE = 1e30  # sums of exponentials between 1 / SAFE and SAFE are taken as they are


class OutputLoss(NamedTuple):
    """What an output layer says of N events."""

    total: Tensor  # () the weighted sum of the nats: what is differentiated
    nats: Tensor  # (N,) of each target, float32 at least; outside the graph


class _Output(nn.Module):
    """What both output layers share."""

    def loss(self, states: Tensor, targets: Tensor, weights: Tensor) -> OutputLoss:
        raise NotImplementedError

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target (N,) given its state (N, P), in nats, float32 at least."""
        with torch.no_grad():
            return self.loss(states, targets, torch.ones_like(targets, dtype=states.dtype)).nats


class FullOutput(_Output, nn.Linear):
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
        """Negative log-likelihood of each target, and their weighted sum, whose gradient is worked out on the way.

        Args:
            states, targets, weights: (N, P), (N,) int64, (N,).
            weight: in place of the layer's own, (V, P).
            label_smoothing: share of a target that is spread evenly over the vocabulary, in the sum but not in the nats
                (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
            sample: score these tokens alone; the nats are then an estimate.
        """
        bias: Tensor = self.bias
        weight = self.weight if weight is None else weight
        if sample is not None:
            weight, targets = weight.index_select(0, sample.tokens), sample.targets
            bias = bias.index_select(0, sample.tokens) + sample.correction
        return _softmax_loss(states, weight, bias, targets, weights, label_smoothing)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Natural log-probabilities (N, V) of every token, float32."""
        return F.log_softmax(self(states).float(), -1)


class Sample(NamedTuple):
    """The part of a vocabulary that stands for all of it in one step."""

    tokens: Tensor  # (S,) int64, ascending
    targets: Tensor  # (N,) the place of each event's target among these
    correction: Tensor  # (S,) to be added to the logits: minus the logarithm of the chance to be here


def sample_vocabulary(targets: Tensor, vocab_size: int, frequent: int, sampled: int) -> Sample:
    """The first `frequent` tokens, the targets, and of the others about `sampled` at random.

    With the logits of those drawn raised by -log(their chance), the sum of exponentials over the sample is an unbiased
    estimate of the sum over the vocabulary (importance sampling: Bengio and Senecal 2003,
    https://proceedings.mlr.press/r4/bengio03a.html; one sample for all events of a step: Jean et al. 2015,
    https://arxiv.org/abs/1412.2007). The frequent tokens and the targets, which hold most of it, are exact.
    """
    certain = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
    certain[:frequent] = True
    certain[targets] = True
    others = vocab_size - int(certain.sum())
    chance = min(1.0, sampled / max(1, others))
    drawn = ~certain & (torch.rand(vocab_size, device=targets.device) < chance)
    here = certain | drawn
    tokens = here.nonzero().squeeze(1)
    place = here.cumsum(0) - 1
    return Sample(tokens, place[targets], drawn[tokens] * -math.log(chance))


class AdaptiveOutput(_Output):
    """Adaptive softmax: frequent tokens in a short list, rare ones in clusters with smaller weights.

    Grave et al. 2017, https://arxiv.org/abs/1609.04309; the weights are those of
    `torch.nn.AdaptiveLogSoftmaxWithLoss`, which takes ids sorted by falling frequency, as lmtrain's char and word
    vocabularies are.
    """

    def __init__(self, output_size: int, vocab_size: int) -> None:
        super().__init__()
        cutoffs = sorted({max(1, vocab_size // 16), max(2, vocab_size // 4)})
        div_value = 4.0 if output_size >= 16 else 1.0  # the last cluster's states have size output_size / div_value**2
        self.clusters = nn.AdaptiveLogSoftmaxWithLoss(output_size, vocab_size, cutoffs, div_value, head_bias=True)

    def loss(self, states: Tensor, targets: Tensor, weights: Tensor) -> OutputLoss:
        """As `FullOutput.loss`: the nats of a target in the short list or of its cluster, and of it in its cluster."""
        clusters = self.clusters
        cutoffs, short = clusters.cutoffs[:-1], clusters.shortlist_size
        cluster = torch.bucketize(targets, torch.tensor(cutoffs, device=targets.device), right=True)  # (N,) 0: short
        in_head = torch.where(cluster > 0, short + cluster - 1, targets)
        total, nats = _softmax_loss(states, clusters.head.weight, clusters.head.bias, in_head, weights)
        tails = zip(cutoffs, cast(list[tuple[nn.Module, nn.Linear]], clusters.tail), strict=True)
        for number, (cutoff, (projection, tail)) in enumerate(tails):
            # empty or not: each weight has a gradient, so that several processes sum the same ones
            inside = (cluster == number + 1).nonzero().squeeze(1)
            projected, wanted = projection(states.index_select(0, inside)), targets[inside] - cutoff
            more, inner = _softmax_loss(projected, tail.weight, None, wanted, weights[inside])
            total, nats = total + more, nats.index_add(0, inside, inner)
        return OutputLoss(total, nats)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Natural log-probabilities (N, V) of every token, float32."""
        with torch.autocast(states.device.type, enabled=False):
            result: Tensor = self.clusters.log_prob(states.to(self.clusters.head.weight.dtype))
        return result


def argmax(values: Tensor) -> Tensor:
    """The first of each row's greatest values, (N, V) -> (N,) int64, outside autograd.

    NumPy's search is vectorised on CPU, PyTorch's is not.
    """
    return values.argmax(-1) if values.device.type != "cpu" else torch.from_numpy(values.numpy().argmax(-1))


def _softmax_loss(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
) -> OutputLoss:
    differentiate = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    return OutputLoss(*_SoftmaxLoss.apply(states, weight, bias, targets, weights, smoothing, differentiate))  # type: ignore[no-untyped-call]


class _SoftmaxLoss(torch.autograd.Function):
    """`apply(states, weight, bias, targets, weights, smoothing, differentiate) -> total (), nats (N,)`.

    There is no copy of all logits, least of all in fp32. Of a block of rows, and of it a chunk of the vocabulary at
    a time, logits are computed, and in their place exponentials e, in the dtype of products. Once the sum s of a
    row's exponentials is known, the gradient

        d total / d logit = weight * (e - s [target]) / s

    asks for no other pass over the vocabulary than the two products that lead to the gradients of states and
    weights: the target's place holds what is left of e - s, minus the sum of all others, and the factor weight / s
    goes to the small side of each product. What label smoothing asks beside that is the same for each token of the
    vocabulary: `_smooth` adds it.
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
            states = states.to(torch.promote_types(states.dtype, torch.float32))  # sums and gradients are not rounded
            events = len(states)
            if dtype != states.dtype:
                more = room_for(events) - events  # these weigh nothing
                states, targets = F.pad(states, (0, 0, 0, more)), F.pad(targets, (0, more))
                weights = F.pad(weights, (0, more))
            nats = torch.empty_like(states[:, 0])
            gradients = [torch.empty_like(part) for part in (states, weight, weight[:, 0])] if differentiate else []
            rows = max(1, BUFFER_BYTES // (dtype.itemsize * len(weight)))
            chunks = _Chunks(weight.to(dtype), None if bias is None else bias.to(dtype))
            for start in range(0, max(1, len(states)), rows):
                block = slice(start, start + rows)
                inputs, wanted = states[block], targets[block]
                exponentials, others, of_target, total = chunks.exponentials(inputs, wanted, keep=differentiate)
                nats[block] = total.log() - of_target
                if not differentiate:
                    continue
                chunks.write_targets(exponentials, wanted, smoothing * total - others)
                factor = weights[block].to(total.dtype) / total  # (rows,)
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
    share: float,
    gradients: Sequence[Tensor],
) -> Tensor:
    """The weighted sum of each target's logit over the mean logit; `gradients` get what the mean adds to them.

    With a share e of the target spread out, an event costs nats + e * (logit of the target - mean logit).
    """
    mean_weight = weight.sum(0) / len(weight)  # (P,)
    lead = (states * (weight.index_select(0, targets) - mean_weight)).sum(1)
    if bias is not None:
        lead += bias.index_select(0, targets) - bias.mean()
    if gradients:
        to_states, to_weight, to_bias = gradients
        to_states.sub_(torch.outer(share * weights, mean_weight))
        to_weight.sub_(weights @ states * (share / len(weight)))
        to_bias.sub_(weights.sum() * (share / len(weight)))
    return (lead * weights).sum()


class _Chunks:
    """A vocabulary's weights in chunks of columns, and what the loss does with each; dtype is that of products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        size = CHUNK if weight.device.type == "cpu" else len(weight)
        self.weights = weight.split(size)  # (C, P) each
        self.biases = [None] * len(self.weights) if bias is None else bias.split(size)
        self.starts = range(0, len(weight), size)
        self.dtype = weight.dtype

    def exponentials(self, inputs: Tensor, targets: Tensor, keep: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """exp(logits) of each chunk (rows, C) but 0 for targets, an empty list unless `keep`; the sum of these over
        the vocabulary (rows,); the targets' logits (rows,); the sum with the targets' exponentials (rows,).

        All logits of a row are shifted by the greatest where some would leave the range of floats.
        """
        rounded = inputs.to(self.dtype)
        found, others, of_target = self._exponentials(rounded, inputs.dtype, targets, None, keep)
        total = others + of_target.exp()
        if not bool(((total > 1 / SAFE) & (total < SAFE)).all()):
            tops = [self._logits(rounded, chunk).amax(1) for chunk in range(len(self.weights))]
            shift = torch.stack(tops).amax(0)  # (rows,)
            found, others, of_target = self._exponentials(rounded, inputs.dtype, targets, shift, keep)
            total = others + of_target.exp()
        return found, others, of_target, total

    def _exponentials(
        self, rounded: Tensor, exact: torch.dtype, targets: Tensor, shift: Tensor | None, keep: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        found = []
        others, of_target = torch.zeros_like(rounded[:, 0], dtype=exact), torch.zeros_like(rounded[:, 0], dtype=exact)
        for chunk, (start, weight) in enumerate(zip(self.starts, self.weights, strict=True)):
            logits = self._logits(rounded, chunk)  # (rows, C)
            if shift is not None:
                logits.sub_(shift.unsqueeze(1))
            inside, place = self._places(targets, start, len(weight))
            at = logits.gather(1, place)
            of_target = torch.where(inside, at.squeeze(1).to(exact), of_target)
            # apart from the rest, for a target that is nearly certain leaves little to the others
            logits.scatter_(1, place, at.masked_fill(inside.unsqueeze(1), -torch.inf))
            others += _sum(logits.exp_(), exact)
            if keep:
                found.append(logits)
        return found, others, of_target

    @staticmethod
    def _places(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Which targets lie in a chunk (rows,), and the column of each (rows, 1), any where it lies elsewhere."""
        place = targets - start
        return (place >= 0) & (place < size), place.clamp(0, size - 1).unsqueeze(1)

    def _logits(self, rounded: Tensor, chunk: int) -> Tensor:
        bias, weight = self.biases[chunk], self.weights[chunk].t()
        return rounded @ weight if bias is None else torch.addmm(bias, rounded, weight)

    def write_targets(self, exponentials: Sequence[Tensor], targets: Tensor, values: Tensor) -> None:
        """Put a value (rows,) in the place of each row's target."""
        for start, part in zip(self.starts, exponentials, strict=True):
            inside, place = self._places(targets, start, part.shape[1])
            at = torch.where(inside.unsqueeze(1), values.to(part.dtype).unsqueeze(1), part.gather(1, place))
            part.scatter_(1, place, at)

    def times_weight(self, exponentials: Sequence[Tensor], like: Tensor) -> Tensor:
        """The sum over chunks of exponentials @ weight, (rows, P) in the dtype of `like`."""
        total = torch.zeros_like(like)
        for part, weight in zip(exponentials, self.weights, strict=True):
            add_product(total, part, weight)
        return total

    def weight_gradient(
        self,
        exponentials: Sequence[Tensor],
        inputs: Tensor,
        factor: Tensor,
        to_weight: Tensor,
        to_bias: Tensor,
        add: bool,
    ) -> None:
        """exponentials.T @ (factor * inputs), and the same without inputs, written or added to (V, P) and (V,)."""
        factored = (inputs * factor.unsqueeze(1)).to(self.dtype)
        for start, part in zip(self.starts, exponentials, strict=True):
            block = slice(start, start + part.shape[1])
            place = add_product if add else write_product
            place(to_weight[block], part.t(), factored)
            place(to_bias[block].unsqueeze(1), part.t(), factor.to(self.dtype).unsqueeze(1))


def _sum(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each row's C columns, summed up in `dtype`."""
    if part.dtype == dtype:
        return part.sum(1)
    # PyTorch would first copy all of a bf16 tensor to fp32; 64 columns at a time it keeps the sum in fp32, and what
    # is rounded are so many parts of it that little of the rounding is left
    whole = part.shape[1] // 64 * 64
    parts: Tensor = part[:, :whole].unflatten(1, (-1, 64)).sum(2)  # (rows, C / 64)
    return parts.sum(1, dtype=dtype) + part[:, whole:].sum(1, dtype=dtype)
