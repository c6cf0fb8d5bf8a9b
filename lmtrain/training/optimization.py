"""Optimizers, the learning rate's schedules, gradient clipping."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmtrain.model.language_model import LanguageModel
from lmtrain.training.muon import Muon

GATE_LR_SCALE = 0.3
"""Learning rate of a mixture's gate, as a multiple of `lr`. In the first hundred steps counted n-grams are far better
than the network. A gate that learnt that at the full rate would be so sure of it that it heard of the network hundreds
of steps too late, or never."""

WEIGHT_SHAPED = (torch.optim.AdamW, torch.optim.SGD, torch.optim.SparseAdam, Muon)
"""Optimizers whose state for a weight is tensors of the weight's shape, and a count of steps."""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within this context, making an optimizer does not import PyTorch's compiler.

    That takes two seconds, and PyTorch does it only to switch the compiler off. It skips the import if this attribute,
    PyTorch's own cache, is set. `optimizer_step` avoids a second such import.
    """
    add_group = inspect.unwrap(Optimizer.add_param_group)
    cached = hasattr(add_group, "__dynamo_disable")
    if not cached:
        add_group.__dynamo_disable = add_group
    try:
        yield
    finally:
        if not cached:
            del add_group.__dynamo_disable


def has_sparse_embedding(model: LanguageModel, name: str, weight_decay: float) -> bool:
    """Tell whether a step leaves the embeddings of all tokens that are not in the batch as they are.

    That is so for SGD without weight decay, if the embedding is not tied to the output layer. The embedding then
    gives a sparse gradient, with a row for each token of the batch.
    """
    tied = any(weight is model.embedding.weight for weight in model.output.parameters())
    return name == "sgd" and weight_decay == 0 and not tied


@without_compiler()
def build_optimizers(
    model: LanguageModel,
    *,
    name: Literal["adamw", "muon", "sgd"],
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    muon_lr_scale: float = 1.0,
    ngram_lr_scale: float = 1.0,
) -> list[Optimizer]:
    """Build AdamW, Muon or SGD over the model's weights. Matrices decay; biases, vectors of n-grams and gates do not.

    AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. Muon moves the matrices of the recurrence and
    of the projections; AdamW moves embeddings, the output layer and everything that is no matrix, as in Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon/. A batch contains few of the n-grams, so their vectors have a
    sparse gradient and, except with SGD, an optimizer that moves only those: `torch.optim.SparseAdam`.

    Args:
        muon_lr_scale, ngram_lr_scale: learning rates of Muon's matrices and of the n-grams' vectors, as multiples of
            `lr`.
    """
    vectors: list[Tensor] = list(model.ngram_embeddings.parameters())
    gates: list[Tensor] = [p for name, p in model.mixtures.named_parameters() if ".recent." not in name]
    dense = [p for p in model.parameters() if not any(p is each for each in (*vectors, *gates))]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if gates:
        groups.append({"params": gates, "weight_decay": 0.0, "lr_scale": GATE_LR_SCALE})
    if name == "sgd":
        sparse = {"weight_decay": 0.0, "fused": False, "foreach": False}
        if model.embedding.sparse:
            groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.embedding.weight]
            groups.append({"params": [model.embedding.weight], **sparse})
        if vectors:
            groups.append({"params": vectors, **sparse, "lr_scale": ngram_lr_scale})
        return [torch.optim.SGD(groups, lr=lr, fused=True)]
    optimizers: list[Optimizer] = []
    if name == "muon":
        inner = [p for part in (model.recurrence, model.projections) for p in part.parameters() if p.dim() > 1]
        groups[0]["params"] = [p for p in groups[0]["params"] if not any(p is matrix for matrix in inner)]
        optimizers.append(Muon([{"params": inner, "lr_scale": muon_lr_scale}], lr, weight_decay=weight_decay))
    optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True))
    if vectors:
        group = {"params": vectors, "lr_scale": ngram_lr_scale}
        optimizers.append(torch.optim.SparseAdam([group], lr=lr, betas=(betas[0], betas[1])))
    return optimizers


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
    """Return the learning rate of a step: a linear rise over the warm-up, times the schedule's part of the peak rate.

    Args:
        step: optimizer steps done before this one.
        progress: fraction of the training that is done, 0..1.
        name: cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983), linear, constant, plateau (the rate
            is cut if validation stalls), or one_cycle (Smith and Topin 2018, https://arxiv.org/abs/1708.07120: a
            rise from 1/25 over `rise_fraction` of the training, then a fall, both along half a cosine).
        hold_fraction: cosine and linear keep the peak rate over this fraction of the training before they fall
            (warmup-stable-decay: Hagele et al. 2024, https://arxiv.org/abs/2405.18392).
        cut: product of the factors of all cuts by plateau so far.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(1.0, progress)
    falling = max(0.0, progress - hold_fraction) / (1 - hold_fraction)  # 0..1
    match name:
        case "one_cycle" if progress < rise_fraction:
            return lr * rise * (1 / 25 + (1 - 1 / 25) * (1 - _half_cosine(progress / rise_fraction)))
        case "one_cycle":
            fall = _half_cosine((progress - rise_fraction) / (1 - rise_fraction))
        case "cosine":
            fall = _half_cosine(falling)
        case "linear":
            fall = 1 - falling
        case "plateau":
            return lr * rise * max(cut, final_fraction)
        case _:
            return lr * rise
    return lr * rise * (final_fraction + (1 - final_fraction) * fall)


def _half_cosine(fraction: float) -> float:
    """A fall from 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def set_learning_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group, each scaled by its `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


def optimizer_step(optimizers: Sequence[Optimizer]) -> None:
    """Update the weights once by their gradients, and remove the gradients.

    PyTorch wraps `step` in functions that import its compiler, record for its profiler, call registered hooks and turn
    gradients off. The method is called without them; lmtrain registers no hooks.
    """
    for optimizer in optimizers:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradient(
    parameters: Iterable[Tensor],
    largest: float | None,
    fetch: Callable[[list[Tensor]], list[float]] = lambda numbers: list(map(float, numbers)),
) -> float:
    """Scale the gradient down to the global L2 norm `largest` where it is longer; returns its norm before that.

    Pascanu et al. 2013, https://proceedings.mlr.press/v28/pascanu13.html.

    Args:
        fetch: returns the values of tensors (), which lie where the weights lie; this function waits for nothing else.
    """
    gradients, on_device = [], list[_SummedRows]()
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            if gradient.device.type != "cpu":
                on_device.append(_SummedRows(parameter, gradient))
                gradients.append(on_device[-1].values.view(-1))
                continue
            gradient = parameter.grad = gradient.coalesce()
        if gradient is not None:
            gradients.append((gradient.values() if gradient.is_sparse else gradient).view(-1))
    if gradients[0].device.type == "cpu":  # there a dot product takes half the time of linalg.vector_norm
        squares = [torch.dot(gradient, gradient) for gradient in map(_aligned, gradients)]
        total_norm = torch.stack(squares).sum(dtype=torch.float64).sqrt()
    else:
        total_norm = torch.nn.utils.get_total_norm(gradients)  # one kernel for many gradients
    norm, *counts = fetch([total_norm, *(rows.count for rows in on_device)])
    if largest is not None and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    for rows, count in zip(on_device, counts, strict=True):
        rows.set_gradient(int(count))
    return norm


def _aligned(gradient: Tensor) -> Tensor:
    """Return the gradient, or a copy if its address is no multiple of 64 bytes, as that of each new tensor is.

    MKL sums a dot product in an order that depends on where the operand lies. Under torchrun a gradient lies anywhere
    in a bucket of DistributedDataParallel, so without the copy one process there would not train as one alone.
    """
    return gradient if gradient.data_ptr() % 64 == 0 else gradient.clone()


class _SummedRows:
    """The sparse gradient of a weight (V, E) on a device, with the rows of each token summed, as `coalesce` does.

    `coalesce` waits until the device knows how many tokens there are. Here this number is fetched later, and until
    then the rows beyond it are zeros.

    Attributes:
        values: (N, E) the sums, and then zeros; N rows before summing.
        count: () int64, the number of sums.
    """

    def __init__(self, weight: Tensor, gradient: Tensor) -> None:
        self.weight, unordered = weight, gradient._values()
        rows, order = gradient._indices()[0].sort()  # as `coalesce` sorts them
        place = torch.cat([rows.new_zeros(1), rows.diff().ne(0).cumsum(0)])  # (N,) number of different rows before
        self.rows = torch.zeros_like(rows).scatter_(0, place, rows)  # rows with one place are of one token
        self.values = torch.zeros_like(unordered).index_add_(0, place, unordered.index_select(0, order))
        self.count = place[-1] + 1

    def set_gradient(self, count: int) -> None:
        """Give the weight its gradient, of `count` rows."""
        self.weight.grad = torch.sparse_coo_tensor(
            self.rows[:count].unsqueeze(0), self.values[:count], self.weight.shape,
            is_coalesced=True, check_invariants=False,
        )  # fmt: skip


def optimizer_tensors(optimizers: Sequence[Optimizer], model: LanguageModel) -> dict[str, Tensor]:
    """Return the state of the optimizers as tensors, named by key and weight: `exp_avg/embedding.weight`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)  # SparseAdam counts its steps in an integer
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def set_optimizer_tensors(optimizers: Sequence[Optimizer], model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned. An optimizer's state may have any shape, as factored state has. The
    optimizers keep the given tensors, not copies.

    Raises:
        KeyError: a weight that the model does not have, or that no optimizer moves.
        ValueError: a shape that this optimizer can't have made.
    """
    parameters = dict(model.named_parameters())
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, value in tensors.items():
        key, _, weight = name.partition("/")
        parameter = parameters[weight]
        optimizer = owner[id(parameter)]
        # PyTorch's fused kernels read as many numbers as the weight has, without looking at the state's shape
        wanted = torch.Size(()) if key == "step" else parameter.shape
        if isinstance(optimizer, WEIGHT_SHAPED) and value.shape != wanted:
            raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(wanted)}")
        # a step counter stays where the fused optimizer wants it: beside its weight
        integer = isinstance(optimizer, torch.optim.SparseAdam) and key == "step"
        optimizer.state[parameter][key] = int(value) if integer else value.to(parameter.device)
