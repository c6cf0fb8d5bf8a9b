"""The trained model of a run: from its configuration and its checkpoints to a `LanguageModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtrain import checkpoint, counted
from lmtrain.checkpoint import Kind
from lmtrain.config import Config
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.run import USED, RunDirectory, check_tokenizer, unusable


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
        ngrams=model.ngrams,
        ngram_buckets=model.ngram_buckets,
        counts=model.counts,
        tie_weights=model.tie_weights,
        output=model.output,
        backend=model.backend,
        sampled_tokens=config.training.sampled_tokens,
        frequent_tokens=config.training.frequent_tokens,
        **config.regularization.model_dump(),
    )


def weights(model: LanguageModel) -> dict[str, Tensor]:
    """The model's weights by name; tied ones once."""
    return dict(model.named_parameters())


class _NoStartValues(TorchFunctionMode):
    """Start values are left out: for weights without memory PyTorch imports its compiler to compute them, seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return function(*args, **given)


def weight_kinds(config: Config, vocab_size: int) -> dict[str, Kind]:
    """What the weights of a configuration's model look like, without any memory for them."""
    with torch.device("meta"), _NoStartValues():
        own = weights(build_model(config, vocab_size))
    return {name: Kind("F32", tuple(weight.shape)) for name, weight in own.items()}


def count_weights(config: Config, vocab_size: int) -> int:
    """How many numbers there are to learn; tied ones once."""
    return sum(prod(kind.shape) for kind in weight_kinds(config, vocab_size).values())


def check_weights(found: Mapping[str, Kind], wanted: Mapping[str, Kind], name: str) -> None:
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


def _words(kind: Kind) -> str:
    return f"{kind.shape} {kind.dtype}"


@torch.no_grad()
def load_weights(model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Put saved weights, checked before, into a model."""
    for key, parameter in weights(model).items():
        parameter.copy_(tensors[key])


class Loaded(NamedTuple):
    """A trained model as it comes out of its run."""

    run: RunDirectory
    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    step: int


def load_run(run: RunDirectory, device: torch.device, notify: Callable[[str], None]) -> Loaded:
    """The run's best model, else its last one, in evaluation mode; a damaged checkpoint is passed over and named.

    Raises:
        ArtefactError: no checkpoint that is whole, or files that don't fit together.
    """
    config, tokenizer = run.judged()
    wanted = weight_kinds(config, tokenizer.vocab_size)
    problems: list[str] = []
    if not run.candidates():
        raise ArtefactError(f"{run.path}: no checkpoint yet; train it further with --resume")
    for step in run.candidates():
        name = str(checkpoint.home_of(run.checkpoints, step) / "model.safetensors")
        try:
            check_weights(checkpoint.survey(run.checkpoints, step, USED)["model.safetensors"], wanted, name)
            saved = checkpoint.load(run.checkpoints, step, USED)
            check_finite(saved.model, name)
            check_tokenizer(tokenizer, saved.state, name)
        except checkpoint.NewerFormatError:
            raise
        except ArtefactError as error:
            problems.extend(error.faults)
            continue
        for problem in problems:
            notify(f"passed over: {problem}")
        model = build_model(config, tokenizer.vocab_size)
        load_weights(model, saved.model)
        if config.model.counts is not None:
            model.put_counts(counted.read(run.path / counted.FILE, saved.state.get("counts"), config, tokenizer))
        return Loaded(run, config, tokenizer, model.to(device).eval(), step)
    raise unusable(problems)
