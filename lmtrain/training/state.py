"""What a run keeps to go on as if it had never been stopped, and how it is judged before anything goes on from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError
from lmtrain.runs import checkpoint
from lmtrain.runs.checkpoint import NewerFormatError, TensorSpec
from lmtrain.runs.directory import RunDirectory, check_tokenizer
from lmtrain.runs.weights import check_finite, check_weights, weight_specs
from lmtrain.training.figures import Window

FACTS = TypeAdapter(tuple[dict[str, int], dict[str, Any], dict[str, str]])
LARGEST_RANDOM_STATE = 1 << 16  # bytes; PyTorch's are some 5,000


@dataclass
class TrainingState:
    """Where a run stands; with weights, optimizer and random state this is all that a resume needs."""

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_figures: dict[str, float] = field(default_factory=dict)
    bad_validations: int = 0
    validation_losses: list[float] = field(default_factory=list)  # while averaging waits for its trigger
    stale_validations: int = 0  # since the best one, the last cut or the last rollback
    cut: float = 1.0  # what plateau has left of the learning rate
    averaged_steps: int | None = None  # None: there is no average
    validated_step: int = 0
    elapsed_s: float = 0.0
    finished: bool = False
    precision: str = "fp32"
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, state: Any) -> TrainingState:
        """Out of a checkpoint's state.json; raises ValueError where it is not a state."""
        found = TypeAdapter(cls).validate_python(state)
        whole = (found.step, found.epoch, found.next_batch, found.best_step or 0)
        if min(whole) < 0 or found.precision not in ("fp32", "bf16"):
            raise ValueError
        return found


class LoadedCheckpoint(NamedTuple):
    """A checkpoint that is whole and of this run."""

    name: str
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # `PART/NAME`: optimizer, carried state, weights beside their average; random state
    state: TrainingState
    lengths: dict[str, int]  # bytes of each metric file
    environment: dict[str, Any]  # in which the run was begun
    data: dict[str, str]  # SHA-256 of each file
    counts: Any = None  # SHA-256 of the run's counted n-grams


def newest_whole(
    run: RunDirectory, config: Config, tokenizer: Tokenizer, problems: list[str]
) -> LoadedCheckpoint | None:
    """The newest checkpoint that is whole and of this run; what is wrong with newer ones goes to `problems`.

    Raises:
        NewerFormatError: one that a later lmtrain wrote.
    """
    for step in checkpoint.steps(run.checkpoints):
        try:
            return read_saved(run, config, tokenizer, step)
        except NewerFormatError:
            raise
        except ArtefactError as error:
            problems.extend(error.faults)
    return None


def read_saved(run: RunDirectory, config: Config, tokenizer: Tokenizer, step: int) -> LoadedCheckpoint:
    """Read a checkpoint; its tensors are held against the configuration before their memory is taken.

    Raises:
        ArtefactError: damaged, or not of this run.
    """
    home = str(checkpoint.home_of(run.checkpoints, step))
    kinds, wanted = checkpoint.read_headers(run.checkpoints, step), weight_specs(config, tokenizer.vocab_size)
    check_weights(kinds["model.safetensors"], wanted, f"{home}/model.safetensors")
    for name, kind in kinds["training.safetensors"].items():
        if not _belongs(name, kind, wanted, config):
            raise ArtefactError(f"{home}/training.safetensors: tensor {name[:100]!r} is not of this run")
    saved = checkpoint.load(run.checkpoints, step)
    check_finite(saved.model, f"{home}/model.safetensors")
    check_finite(part_of(saved.training, "weights"), f"{home}/training.safetensors")
    check_tokenizer(tokenizer, saved.state, home)
    try:
        state = TrainingState.from_json(saved.state["training"])
        lengths, begun_in, data = FACTS.validate_python([saved.state[k] for k in ("lengths", "environment", "data")])
        if state.step != step or min(lengths.values(), default=0) < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{home}/state.json: not a training state") from None
    return LoadedCheckpoint(
        home, saved.model, saved.training, state, lengths, begun_in, data, saved.state.get("counts")
    )


def _belongs(name: str, kind: TensorSpec, wanted: Mapping[str, TensorSpec], config: Config) -> bool:
    """Whether a tensor may be part of what this training keeps."""
    part, _, rest = name.partition("/")
    match part:
        case "weights":
            return kind == wanted.get(rest)
        case "optimizer":
            weight = wanted.get(rest.partition("/")[2])
            return weight is not None and (kind.shape == weight.shape or prod(kind.shape) == 1)
        case "carried":
            model, rows = config.model, config.batching.batch_size
            widest = (
                max(model.layer_sizes or [model.hidden_size])
                + max(model.ngram_embeddings or [0])
                + (model.ngram_counts or 0)
            )
            place = rest == "history" or re.fullmatch("[0-9]{1,4}/[01]", rest) is not None
            return place and len(kind.shape) == 2 and kind.shape[0] == rows and kind.shape[1] <= widest
        case _:
            random = part in ("cpu", "cuda") and re.fullmatch("[0-9]{0,6}", rest) is not None  # of each process
            return random and kind.dtype == "U8" and prod(kind.shape) <= LARGEST_RANDOM_STATE


def part_of(training: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of what training keeps."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in training.items() if key.startswith(prefix)}
