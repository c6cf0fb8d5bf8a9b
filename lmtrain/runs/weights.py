"""The trained model of a run: from its configuration and its checkpoints to a `LanguageModel`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtrain.config import Config
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs.checkpoint import TensorSpec


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """The model that a configuration describes, with fresh weights."""
    model = config.model
    return LanguageModel(
        vocab_size,
        embedding_size=model.embedding_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        layer_sizes=model.layer_sizes,
        cell=model.cell,
        bidirectional=model.bidirectional,
        dropout=model.dropout,
        residual=model.residual,
        layer_norm=model.layer_norm,
        ngram_embeddings=model.ngram_embeddings,
        ngram_embedding_buckets=model.ngram_embedding_buckets,
        ngram_counts=model.ngram_counts,
        tie_weights=model.tie_weights,
        output=model.output,
        backend=model.backend,
        sampled_tokens=config.training.sampled_tokens,
        frequent_tokens=config.training.frequent_tokens,
        **config.regularization.model_dump(),
    )


def named_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The model's weights by name; tied ones once."""
    return dict(model.named_parameters())


class _NoStartValues(TorchFunctionMode):
    """Start values are left out: for weights without memory PyTorch imports its compiler to compute them, seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return function(*args, **given)


def weight_specs(config: Config, vocab_size: int) -> dict[str, TensorSpec]:
    """What the weights of a configuration's model look like, without any memory for them."""
    with torch.device("meta"), _NoStartValues():
        own = named_weights(build_model(config, vocab_size))
    return {name: TensorSpec("F32", tuple(weight.shape)) for name, weight in own.items()}


def count_weights(config: Config, vocab_size: int) -> int:
    """How many numbers there are to learn; tied ones once."""
    return sum(prod(kind.shape) for kind in weight_specs(config, vocab_size).values())


def check_weights(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], name: str) -> None:
    """Hold saved weights against a configuration's before they are read.

    Raises:
        ArtefactError: a tensor missing, unknown, of another shape or type.
    """
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())
        raise ArtefactError(f"{name}: {'missing' if odd[0] in wanted else 'unknown'} tensor {odd[0][:100]!r}")
    for key, kind in wanted.items():
        if found[key] != kind:
            raise ArtefactError(
                f"{name}: tensor {key!r} is {_words(found[key])}, the run's config and tokenizer want {_words(kind)}"
            )


def check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises ArtefactError where a saved weight is no number."""
    for key, saved in tensors.items():
        if not bool(torch.isfinite(saved).all()):
            raise ArtefactError(f"{name}: tensor {key!r} holds values that are not finite")


def _words(kind: TensorSpec) -> str:
    return f"{kind.shape} {kind.dtype}"


@torch.no_grad()
def load_weights(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put saved weights, checked before, into a model."""
    for key, parameter in named_weights(model).items():
        parameter.copy_(tensors[key])
