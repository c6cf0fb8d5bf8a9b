"""The state of a training run in a checkpoint, and the checks that a checkpoint passes before a run is restored."""

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
from lmtrain.runs.checkpoint import TRAINING_FILE, TensorSpec
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.loading import read_weights
from lmtrain.runs.weights import check_finite, weight_specs
from lmtrain.training.figures import Window

FACTS = TypeAdapter(tuple[dict[str, int], dict[str, Any], dict[str, str]])
LARGEST_RANDOM_STATE = 1 << 16  # bytes; PyTorch's are some 5,000


@dataclass
class TrainingState:
    """The counters of a run. With weights, optimizer and random state they are all that a resume needs."""

    step: int = 0
    epoch: int = 0
    next_batch: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    best_figures: dict[str, float] = field(default_factory=dict)
    bad_validations: int = 0
    validation_losses: list[float] = field(default_factory=list)  # while averaging waits for its trigger
    stale_validations: int = 0  # validations since the best one, or since plateau last cut the learning rate
    cut: float = 1.0  # product of the factors of all cuts by plateau so far
    averaged_steps: int | None = None  # None: there is no average
    validated_step: int = 0
    elapsed_s: float = 0.0
    finished: bool = False
    precision: str = "fp32"
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, state: Any) -> TrainingState:
        """Read the state out of a checkpoint's state.json; raises ValueError if it is not one."""
        found = TypeAdapter(cls).validate_python(state)
        whole = (found.step, found.epoch, found.next_batch, found.best_step or 0)
        if min(whole) < 0 or found.precision not in ("fp32", "bf16"):
            raise ValueError
        return found


class LoadedCheckpoint(NamedTuple):
    """A checkpoint that is whole and belongs to this run."""

    name: str
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # `PART/NAME`: optimizer, carried state, weights beside their average; random state
    state: TrainingState
    lengths: dict[str, int]  # bytes of each metric file
    environment: dict[str, Any]  # the environment in which the run was begun
    data: dict[str, str]  # SHA-256 of each file
    counts: Any = None  # SHA-256 of the run's counted n-grams


def read_saved(run: RunDirectory, config: Config, tokenizer: Tokenizer, step: int) -> LoadedCheckpoint:
    """Read a checkpoint. Its tensors are compared with the configuration before memory is taken for them.

    Raises:
        ArtefactError: damaged, or not of this run.
    """
    home = str(checkpoint.directory_of(run.checkpoints, step))
    wanted = weight_specs(config, tokenizer.vocab_size)
    saved = read_weights(run, tokenizer, step, wanted)
    for name, spec in checkpoint.read_headers(run.checkpoints, step, (TRAINING_FILE,))[TRAINING_FILE].items():
        if not _belongs(name, spec, wanted, config):
            raise ArtefactError(f"{home}/training.safetensors: tensor {name[:100]!r} is not of this run")
    training = checkpoint.load(run.checkpoints, step, (TRAINING_FILE,)).training
    check_finite(part_of(training, "weights"), f"{home}/{TRAINING_FILE}")
    try:
        state = TrainingState.from_json(saved.state["training"])
        lengths, begun_in, data = FACTS.validate_python([saved.state[k] for k in ("lengths", "environment", "data")])
        if state.step != step or min(lengths.values(), default=0) < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{home}/state.json: not a training state") from None
    counts = saved.state.get("counts")
    return LoadedCheckpoint(home, saved.model, training, state, lengths, begun_in, data, counts)


def _belongs(name: str, spec: TensorSpec, wanted: Mapping[str, TensorSpec], config: Config) -> bool:
    """Tell whether a checkpoint of this training may hold a tensor of this name and shape."""
    part, _, rest = name.partition("/")
    match part:
        case "weights":
            return spec == wanted.get(rest)
        case "optimizer":  # any shape passes here: `set_optimizer_tensors` checks it
            return rest.partition("/")[2] in wanted
        case "carried":
            model, rows = config.model, config.batching.batch_size
            sizes = [*(model.layer_sizes or [model.hidden_size]), *model.ngram_embeddings, model.ngram_counts or 0]
            known = rest == "history" or re.fullmatch("[0-9]{1,4}/[01]", rest) is not None
            return known and len(spec.shape) == 2 and spec.shape[0] == rows and spec.shape[1] <= max(sizes)
        case _:
            random = re.fullmatch("[a-z]{2,20}/?[0-9]{0,6}", name) is not None  # a type of device, a rank
            return random and spec.dtype == "U8" and prod(spec.shape) <= LARGEST_RANDOM_STATE


def part_of(training: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a checkpoint's training.safetensors."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in training.items() if key.startswith(prefix)}
