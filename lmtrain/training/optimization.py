"""Optimizers, the learning rate's schedule, gradient clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmtrain.model.language_model import LanguageModel

# At an optimizer's first use PyTorch imports its compiler, which takes two seconds, only to keep it off. Where its own
# cache for that (this attribute) is filled, it does not; `step` has the other half.
_add_group = inspect.unwrap(Optimizer.add_param_group)
_add_group.__dynamo_disable = _add_group


def build_optimizer(
    model: LanguageModel, *, name: Literal["adamw", "sgd"], lr: float, betas: Sequence[float], weight_decay: float
) -> Optimizer:
    """AdamW or SGD over the model's weights; matrices decay, biases do not.

    Where a step leaves the embeddings of tokens that are not in the batch as they are (SGD without decay, embedding
    not tied to the output layer), the embedding is set to give its gradient as the rows of the batch's tokens alone.

    AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    embedding, parameters = model.embedding.weight, list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":  # it moves every weight at every step, whether the batch has its token or not
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)
    tied = any(weight is embedding for weight in model.output.parameters())
    if weight_decay == 0 and not tied:
        model.embedding.sparse = True
        groups[0]["params"] = [p for p in groups[0]["params"] if p is not embedding]
        groups.append({"params": [embedding], "weight_decay": 0.0, "fused": False, "foreach": False})
    return torch.optim.SGD(groups, lr=lr, fused=True)


def learning_rate(
    step: int, progress: float, *, lr: float, name: str, warmup_steps: int, final_fraction: float
) -> float:
    """The rate of a step: a linear rise over the warm-up, times the schedule's fall.

    Args:
        step: optimizer steps done before this one.
        progress: share of the training that is done, 0..1.
        name: cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983), linear or constant.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    match name:
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "linear":
            fall = 1 - min(1.0, progress)
        case _:
            return lr * rise
    return lr * rise * (final_fraction + (1 - final_fraction) * fall)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step(optimizer: Optimizer) -> None:
    """One update of the weights by their gradients, which are then gone.

    The method is called without PyTorch's wrappers: they import its compiler, take notes for its profiler and call
    registered hooks, of which there are none, and turn gradients off.
    """
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
    norm = float(torch.stack([torch.dot(gradient, gradient) for gradient in gradients]).sum(dtype=torch.float64).sqrt())
    if largest is not None and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    return norm


def optimizer_tensors(optimizer: Optimizer, model: LanguageModel) -> dict[str, Tensor]:
    """The optimizer's state as tensors, named by weight: `exp_avg/embedding.weight`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def set_optimizer_tensors(optimizer: Optimizer, model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        key, _, weight = name.partition("/")
        parameter = parameters[weight]
        # a scalar step counter stays where the fused optimizer wants it: beside its weight
        optimizer.state[parameter][key] = value.to(parameter.device).clone()
