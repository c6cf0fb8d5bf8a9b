"""Builds the model that a configuration describes, and checks and loads its weights."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtrain.config import Config
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs.tensor_file import TensorSpec

CHECKED_AT_ONCE = 1 << 21  # values


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """Build the model that a configuration describes, with freshly initialised weights."""
    return LanguageModel(
        vocab_size,
        **config.model.model_dump(),
        **config.regularization.model_dump(),
        sampled_tokens=config.training.sampled_tokens,
        frequent_tokens=config.training.frequent_tokens,
    )


def named_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Return the weights of a model by name; tied weights occur once."""
    return dict(model.named_parameters())


class _SkipInitialisation(TorchFunctionMode):
    """While this mode is active, the functions of `torch.nn.init` do nothing.

    For weights without memory PyTorch imports its compiler to compute start values, which takes seconds. Weights that
    are not set take no memory yet: with `model.tie_weights` the output layer's own are thrown away again.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return keywords["tensor"] if "tensor" in keywords else args[0]
        return function(*args, **keywords)


def build_empty_model(config: Config, vocab_size: int) -> LanguageModel:
    """Build the model that a configuration describes for saved weights, which are to be copied into it. The random
    state of the program stays as it is."""
    with torch.random.fork_rng(devices=[]), _SkipInitialisation():  # a few start values are drawn all the same
        return build_model(config, vocab_size)


def weight_specs(config: Config, vocab_size: int) -> dict[str, TensorSpec]:
    """Return the type and shape of each weight of a configuration's model, without taking memory for the weights."""
    with torch.device("meta"), _SkipInitialisation():
        weights = named_weights(build_model(config, vocab_size))
    return {name: TensorSpec("F32", tuple(weight.shape)) for name, weight in weights.items()}


def count_weights(config: Config, vocab_size: int) -> int:
    """Count the trainable numbers of a configuration's model; tied weights count once."""
    return sum(prod(spec.shape) for spec in weight_specs(config, vocab_size).values())


def check_weights(saved: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], path: str) -> None:
    """Compare the header of saved weights with what a configuration asks for, before the weights are read.

    Raises:
        ArtefactError: a tensor is missing or unknown, or has another shape or type; `path` names the file.
    """
    if wanted.keys() != saved.keys():
        name = min(wanted.keys() ^ saved.keys())
        raise ArtefactError(f"{path}: {'missing' if name in wanted else 'unknown'} tensor {name[:100]!r}")
    for name, spec in wanted.items():
        if saved[name] != spec:
            raise ArtefactError(f"{path}: tensor {name!r} is {saved[name]}, the run's config and tokenizer need {spec}")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds no infinity and no NaN; piece by piece, since the comparison needs memory, too."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.detach().flatten().split(CHECKED_AT_ONCE))
