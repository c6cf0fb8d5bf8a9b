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
from lmtrain.runs.checkpoint import FILES, MODEL_FILE, TRAINING_FILE
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.loading import open_weights
from lmtrain.runs.tensor_file import SavedFile, TensorSpec
from lmtrain.runs.weights import weight_specs
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


class SavedCheckpoint(NamedTuple):
    """A checkpoint that belongs to this run: its state, and its files, whose tensors are not read yet."""

    name: str
    files: dict[str, SavedFile]
    state: TrainingState
    lengths: dict[str, int]  # bytes of each metric file
    environment: dict[str, Any]  # the environment in which the run was begun
    data: dict[str, str]  # SHA-256 of each file
    counts: Any = None  # SHA-256 of the run's counted n-grams

    def read_tensors(self, into: Mapping[str, Tensor]) -> None:
        """Copy the tensors into those of the same names, and check the files, see `SavedFile.read_tensors`.

        A weight, or its average where there is one, has the weight's name; the rest of a training is named `PART/NAME`,
        with the parts `optimizer`, `carried` (hidden states) and `weights` (beside their average); random states have
        the names of `random_state`, with `/RANK` for all ranks but 0.

        Raises:
            ArtefactError: a file is damaged, or a weight is not finite.
        """
        self.files[MODEL_FILE].read_tensors(into, finite="")
        self.files[TRAINING_FILE].read_tensors(into, finite="weights/")


def open_checkpoint(run: RunDirectory, config: Config, tokenizer: Tokenizer, step: int) -> SavedCheckpoint:
    """Read the state of a checkpoint, and compare its tensors with the configuration before memory is taken for them.

    Raises:
        ArtefactError: damaged, or not of this run.
    """
    home = str(checkpoint.directory_of(run.checkpoints, step))
    wanted = weight_specs(config, tokenizer.vocab_size)
    files, saved = open_weights(run, tokenizer, step, wanted, FILES)
    for name, spec in files[TRAINING_FILE].specs.items():
        if not _belongs(name, spec, wanted, config):
            raise ArtefactError(f"{home}/training.safetensors: tensor {name[:100]!r} is not of this run")
    try:
        state = TrainingState.from_json(saved["training"])
        lengths, begun_in, data = FACTS.validate_python([saved[k] for k in ("lengths", "environment", "data")])
        if state.step != step or min(lengths.values(), default=0) < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{home}/state.json: not a training state") from None
    return SavedCheckpoint(home, files, state, lengths, begun_in, data, saved.get("counts"))


def _belongs(name: str, spec: TensorSpec, wanted: Mapping[str, TensorSpec], config: Config) -> bool:
    """Tell whether a checkpoint of this training may hold a tensor of this name and shape."""
    part, _, rest = name.partition("/")
    match part:
        case "weights":
            return spec == wanted.get(rest)
        case "optimizer":  # `set_optimizer_tensors` checks the shape; here only that it is no larger
            weight = wanted.get(rest.partition("/")[2])
            return weight is not None and prod(spec.shape) <= max(1, prod(weight.shape))
        case "carried":
            model, rows = config.model, config.batching.batch_size
            histories = [*model.ngram_embeddings, model.ngram_counts or 0, model.recent_tokens or 0]
            sizes = [*(model.layer_sizes or [model.hidden_size]), *histories]
            known = rest == "history" or re.fullmatch("[0-9]{1,4}/[01]", rest) is not None
            return known and len(spec.shape) == 2 and spec.shape[0] == rows and spec.shape[1] <= max(sizes)
        case _:
            random = re.fullmatch("[a-z]{2,20}/?[0-9]{0,6}", name) is not None  # a type of device, a rank
            return random and spec.dtype == "U8" and prod(spec.shape) <= LARGEST_RANDOM_STATE


def part_of(training: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a checkpoint's training.safetensors."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in training.items() if key.startswith(prefix)}
