"""Optimizers, the learning rate's schedules, gradient clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmtrain.model.language_model import LanguageModel
from lmtrain.training.muon import Muon

# At an optimizer's first use PyTorch imports its compiler, which takes two seconds, only to keep it off. Where its own
# cache for that (this attribute) is filled, it does not; `step` has the other half.
_add_group = inspect.unwrap(Optimizer.add_param_group)
_add_group.__dynamo_disable = _add_group


def build_optimizers(
    model: LanguageModel,
    *,
    name: Literal["adamw", "muon", "sgd"],
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    muon_rate: float = 1.0,
    ngram_rate: float = 1.0,
) -> list[Optimizer]:
    """AdamW, Muon or SGD over the model's weights; matrices decay, biases and the vectors of n-grams do not.

    Muon moves the matrices of recurrence and projections; embeddings, the output layer and all that is no matrix are
    AdamW's, as Jordan et al. have it.

    These vectors, of which a batch knows few, have a sparse gradient, and but for SGD an optimizer that only moves
    those (`torch.optim.SparseAdam`). Where a step leaves the embeddings of tokens that are not in the batch as they
    are (SGD without decay, embedding not tied to the output layer), the embedding is set to give such a gradient, too.

    AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.

    Args:
        muon_rate, ngram_rate: learning rates of Muon's matrices and of the vectors of n-grams, in shares of `lr`.
    """
    embedding: Tensor = model.embedding.weight
    ngrams: list[Tensor] = list(model.ngrams.parameters())
    dense = [p for p in model.parameters() if not any(p is vectors for vectors in ngrams)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name != "sgd":  # every weight moves at every step, whether the batch has its token or not
        optimizers: list[Optimizer] = []
        if name == "muon":
            inner = [p for part in (model.recurrence, model.projections) for p in part.parameters() if p.dim() > 1]
            groups[0]["params"] = [p for p in groups[0]["params"] if not any(p is matrix for matrix in inner)]
            optimizers.append(Muon([{"params": inner, "share": muon_rate}], lr, weight_decay=weight_decay))
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True))
        if ngrams:
            vectors = {"params": ngrams, "share": ngram_rate}
            optimizers.append(torch.optim.SparseAdam([vectors], lr=lr, betas=(betas[0], betas[1])))
        return optimizers
    tied = any(weight is embedding for weight in model.output.parameters())
    if weight_decay == 0 and not tied:
        model.embedding.sparse = True
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not embedding]
        groups.append({"params": [embedding], "weight_decay": 0.0, "fused": False, "foreach": False})
    if ngrams:
        groups.append({"params": ngrams, "weight_decay": 0.0, "fused": False, "foreach": False, "share": ngram_rate})
    return [torch.optim.SGD(groups, lr=lr, fused=True)]


def learning_rate(
    step: int,
    progress: float,
    *,
    lr: float,
    name: str,
    warmup_steps: int,
    final_fraction: float,
    hold_fraction: float = 0.0,
    rise_fraction: float = 0.3,
    cut: float = 1.0,
) -> float:
    """The rate of a step: a linear rise over the warm-up, times what the schedule makes of the peak rate.

    Args:
        step: optimizer steps done before this one.
        progress: share of the training that is done, 0..1.
        name: cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983), linear, constant, plateau (cut
            where validation stalls), or one_cycle (Smith and Topin 2018, https://arxiv.org/abs/1708.07120: a rise from
            1/25 over `rise_fraction` of the training, then a fall, both by half a cosine).
        hold_fraction: of cosine and linear, share of the training before the fall (Hagele et al. 2024,
            https://arxiv.org/abs/2405.18392).
        cut: what plateau's cuts have left of the rate.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(1.0, progress)
    falling = max(0.0, progress - hold_fraction) / (1 - hold_fraction)  # 0..1
    match name:
        case "one_cycle" if progress < rise_fraction:
            return lr * rise * (1 / 25 + (1 - 1 / 25) * (1 - _fall(progress / rise_fraction)))
        case "one_cycle":
            fall = _fall((progress - rise_fraction) / (1 - rise_fraction))
        case "cosine":
            fall = _fall(falling)
        case "linear":
            fall = 1 - falling
        case "plateau":
            return lr * rise * max(cut, final_fraction)
        case _:
            return lr * rise
    return lr * rise * (final_fraction + (1 - final_fraction) * fall)


def _fall(share: float) -> float:
    """From 1 to 0 by half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Set the rate of every group to its share of this one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)


def step(optimizers: Sequence[Optimizer]) -> None:
    """One update of the weights by their gradients, which are then gone.

    The method is called without PyTorch's wrappers: they import its compiler, take notes for its profiler and call
    registered hooks, of which there are none, and turn gradients off.
    """
    for optimizer in optimizers:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradient(parameters: Iterable[Tensor], largest: float | None) -> float:
    """Scale the gradient to the global L2 norm `largest` where it is longer; returns its norm before.

    Pascanu et al. 2013, https://proceedings.mlr.press/v28/pascanu13.html.
    """
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            gradient = parameter.grad = gradient.coalesce()
        if gradient is not None:
            gradients.append((gradient.values() if gradient.is_sparse else gradient).view(-1))
    # on CPU a dot product takes half the time of linalg.vector_norm
    squares = [torch.dot(each, each) for each in map(_aligned, gradients)]
    norm = float(torch.stack(squares).sum(dtype=torch.float64).sqrt())
    if largest is not None and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    return norm


def _aligned(gradient: Tensor) -> Tensor:
    """The gradient, or its copy where it does not lie at a multiple of 64 bytes, where PyTorch puts each new tensor.

    MKL sums a dot product in an order that depends on where the operand lies. Under torchrun a gradient lies anywhere
    in a bucket of DistributedDataParallel, so without this one process there would not train as one alone does.
    """
    return gradient if gradient.data_ptr() % 64 == 0 else gradient.clone()


def optimizer_tensors(optimizers: Sequence[Optimizer], model: LanguageModel) -> dict[str, Tensor]:
    """The optimizers' state as tensors, named by weight: `exp_avg/embedding.weight`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)  # SparseAdam counts its steps in an integer
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def set_optimizer_tensors(optimizers: Sequence[Optimizer], model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    home = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, value in tensors.items():
        key, _, weight = name.partition("/")
        parameter = parameters[weight]
        optimizer = home[id(parameter)]
        # a scalar step counter stays where the fused optimizer wants it: beside its weight
        integer = isinstance(optimizer, torch.optim.SparseAdam) and key == "step"
        optimizer.state[parameter][key] = int(value) if integer else value.to(parameter.device).clone()
