"""Evaluation that adapts to the text it reads: a neural cache, and dynamic evaluation. Each token is scored before
anything is adapted to it, so both give true probabilities of the text.

Shapes: N events of a batch, W events in the cache, P output size.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain.data.batches.rows import Batch
from lmtrain.inference.scoring import encoded_batches
from lmtrain.metrics import Tally
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Objective
from lmtrain.model.states import CarriedState


@dataclass(frozen=True)
class Cache:
    """A neural cache: Grave et al. 2017, https://arxiv.org/abs/1612.04426.

    The model's probabilities are mixed with those of the last `size` tokens. The hidden state h_i before each of these
    is compared with the present one, h: p(w) = (1 - share) p_model(w) + share sum_i [w_i = w] softmax_i(theta h . h_i).
    """

    size: int  # tokens in the cache
    theta: float = 0.3  # the greater it is, the more the tokens after the most similar states outweigh the others
    share: float = 0.1  # weight of the cache in the mixture, from 0 to 1


@dataclass(frozen=True)
class Dynamic:
    """Dynamic evaluation by gradient descent: Krause et al. 2018, https://arxiv.org/abs/1709.07432.

    Each chunk of `steps` tokens is scored, and then the model learns from the gradient of the chunk's nats per token:
    w <- w - lr * gradient + decay * (w_0 - w). With counted n-grams the network's weights follow the gradient of the
    network's own nats, and the gate follows that of the mixture's.
    """

    lr: float  # learning rate
    decay: float = 0.0  # fraction of the distance to the trained weights w_0 that each chunk takes back
    steps: int = 20  # tokens per chunk


@torch.inference_mode()
def evaluate_with_cache(model: LanguageModel, batches: Iterable[Batch], cache: Cache) -> Tally:
    """Sum the nats of a text that is read in one column; state and cache are carried from batch to batch."""
    device, result = model.embedding.weight.device, Tally()
    keys: Tensor | None = None  # (W, P) states before the cached tokens
    values = torch.empty(0, dtype=torch.int64, device=device)  # (W,) the cached tokens
    for encoded in encoded_batches(model, batches, columns=1):
        events = encoded.events["forward"]
        states, targets = events.states.float(), events.targets
        keys = states[:0] if keys is None else keys
        nats = model.nats("forward", events).double()
        for part in torch.arange(len(targets), device=device).split(512):
            start, end = int(part[0]), int(part[-1]) + 1
            keys, values = torch.cat([keys, states[start:end]]), torch.cat([values, targets[start:end]])
            before = len(keys) - (end - start)  # events in `keys` before the first of this part
            cached = cache_probability(keys, values, before, targets[start:end], cache)
            mixed = torch.log((1 - cache.share) * torch.exp(-nats[start:end]) + cache.share * cached)
            empty = torch.arange(before, len(keys), device=device) == 0  # with an empty cache the model alone counts
            result.add(-float(torch.where(empty, -nats[start:end], mixed).sum()), end - start)
            keys, values = keys[-cache.size :], values[-cache.size :]
    return result


def cache_probability(keys: Tensor, values: Tensor, before: int, wanted: Tensor, cache: Cache) -> Tensor:
    """Return the probabilities (N,) that the cache gives to tokens `wanted` (N,), the last N of its events; each
    sees only the events before it. `keys` (W, P) are states, `values` (W,) the token after each, `before` is W - N.
    """
    query = torch.arange(before, len(keys), device=keys.device).unsqueeze(1)  # (N, 1)
    key = torch.arange(len(keys), device=keys.device)  # (W,)
    seen = (key < query) & (key >= query - cache.size)  # (N, W)
    scores = (cache.theta * (keys[before:] @ keys.t())).double().masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, 1).masked_fill(~seen, 0.0)  # softmax of a row that sees nothing is NaN
    return (weights * (values == wanted.unsqueeze(1))).sum(1)


def evaluate_dynamically(model: LanguageModel, batches: Iterable[Batch], dynamic: Dynamic) -> Tally:
    """Sum the nats of a text that is read in one column, in batches of `dynamic.steps` tokens, while a copy of the
    model learns from it."""
    learner = copy.deepcopy(model).eval()
    learner.embedding.sparse = False
    carried, result = CarriedState(1), Tally()
    start = [parameter.detach() for parameter in model.parameters()]
    for batch in batches:
        count = int(batch.lengths.sum()) - len(batch.lengths)
        weights: dict[Objective, float] = {"forward": 1 / count}
        losses = learner.loss(batch.tokens, batch.lengths, weights, carried.of(batch.order))
        carried.store(batch.order, losses.state)
        result.add(float(losses.nats["forward"]), count)
        losses.total.backward()
        with torch.no_grad():
            for parameter, first in zip(learner.parameters(), start, strict=True):
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=dynamic.lr)
                    parameter.grad = None
                if dynamic.decay:
                    parameter.lerp_(first, dynamic.decay)
    return result
