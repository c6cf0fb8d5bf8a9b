"""What a run needs to go on as if it had never been stopped, and the way of it into checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.optim import Optimizer

from lmtrain import checkpoint
from lmtrain.config import Config
from lmtrain.data.preparation import Corpora
from lmtrain.errors import ArtefactError, ConfigError, DataError, DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import CarriedState
from lmtrain.run import RunDirectory, check_tokenizer, check_weights, load_weights, weights
from lmtrain.runtime import environment, random_state, set_random_state
from lmtrain.training.averaging import Averaging, averaged_weights
from lmtrain.training.figures import Window
from lmtrain.training.optimization import optimizer_tensors, set_optimizer_tensors

# what may differ when a run is resumed: where it ends, what it shows and keeps, where things lie
MAY_CHANGE = (
    "name", "runs_dir", "data.test", "data.cache_dir", "training.max_epochs", "training.max_steps",
    "training.max_minutes", "training.patience", "training.device", "training.num_threads", "checkpoint", "logging",
    "validation", "generation",
)  # fmt: skip


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


class Restored(NamedTuple):
    """What a checkpoint says beside the tensors, which are back in their places."""

    state: TrainingState
    lengths: dict[str, int]  # bytes of each metric file
    environment: dict[str, Any]  # in which the run was begun


class Saves:
    """The checkpoints of one run: what goes into them, what comes out, which are kept."""

    def __init__(
        self,
        run: RunDirectory,
        model: LanguageModel,
        optimizers: list[Optimizer],
        device: torch.device,
        corpora: Corpora,
        config: Config,
        averaging: Averaging,
        carried: CarriedState | None,
    ) -> None:
        self.run, self.model, self.optimizers, self.device = run, model, optimizers, device
        self.corpora, self.config, self.averaging, self.carried = corpora, config, averaging, carried

    def save(self, state: TrainingState, lengths: dict[str, int], begun_in: dict[str, Any]) -> None:
        """Save the run as it stands, then remove what is older than the newest `keep` and not the best.

        The model saved is the average of the weights, where there is one; what is trained stands beside it.
        """
        state.averaged_steps = self.averaging.steps if self.averaging.active else None
        content = {
            "training": asdict(state),
            "lengths": lengths,
            "data": self.corpora.hashes,
            "tokenizer": self.corpora.tokenizer.fingerprint(),
            "environment": begun_in,
        }
        if not all(bool(torch.isfinite(weight).all()) for weight in weights(self.model).values()):
            raise DivergedError(f"step {state.step}: a weight is not finite; try a lower optimizer.lr")
        parts = {
            "optimizer": optimizer_tensors(self.optimizers, self.model),
            "carried": {} if self.carried is None else self.carried.tensors(),
            "weights": averaged_weights(self.model) if self.averaging.active else {},
        }
        training = {f"{part}/{name}": value for part, own in parts.items() for name, value in own.items()}
        training |= random_state(self.device)
        saved_model = weights(self.model) | self.averaging.averages
        checkpoints = self.run.checkpoints
        checkpoint.save(checkpoints, checkpoint.Checkpoint(state.step, saved_model, training, content))
        self._point(state)
        saved = [step for step in checkpoint.steps(checkpoints) if step <= state.step]  # newer ones: passed over
        for old in set(saved) - {*saved[: self.config.checkpoint.keep], state.best_step}:
            checkpoint.remove(checkpoints, old)

    def _point(self, state: TrainingState) -> None:
        if state.best_step is not None and self.run.pointed("best") != state.best_step:
            self.run.point("best", {"step": state.best_step, "valid_loss": state.best_loss})
        self.run.point("last", {"step": state.step})

    def restore(self, notify: Callable[[str], None]) -> Restored | None:
        """Take up the newest whole checkpoint; None where there is none.

        Raises:
            DataError: the training text is not what it was.
            ArtefactError: a checkpoint that is whole, and not of this run.
        """
        checkpoint.remove_leftovers(self.run.checkpoints)
        problems: list[str] = []
        saved = next(checkpoint.newest_whole(self.run.checkpoints, problems), None)
        if saved is None:
            if problems:
                raise ArtefactError(*problems, f"{self.run.path}: no checkpoint that is whole; train a new run")
            return None
        for problem in problems:
            notify(f"passed over: {problem}")
        name = str(checkpoint.home_of(self.run.checkpoints, saved.step))
        check_tokenizer(self.corpora.tokenizer, saved.state, name)
        try:
            restored = TypeAdapter(Restored).validate_python(
                (TrainingState.from_json(saved.state["training"]), saved.state["lengths"], saved.state["environment"])
            )
            before = dict(saved.state["data"])
            if restored.state.step != saved.step or min(restored.lengths.values(), default=0) < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{name}: state.json is not a training state") from None
        for path in sorted(before.keys() | self.corpora.hashes.keys()):
            if self.corpora.hashes.get(path) != before.get(path):
                raise DataError(f"{path}: changed since the run was begun; put it back, or train a new run")
        self._load(saved, restored.state.averaged_steps)
        try:
            if self.carried is not None:
                self.carried.load(_part(saved, "carried"), self.device)
            set_random_state(saved.training, self.device)
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise ArtefactError(f"{name}: training.safetensors is not of this run") from None
        self._point(restored.state)  # killed between a save and its pointers, a run catches up here
        self._compare(restored.environment, notify)
        notify(f"resumed from step {saved.step}")
        return restored

    def _load(self, saved: checkpoint.Checkpoint, averaged_steps: int | None) -> None:
        """Weights, their average and the optimizer as they were saved."""
        name = checkpoint.home_of(self.run.checkpoints, saved.step)
        vocab_size, own = self.corpora.tokenizer.vocab_size, saved.model
        check_weights(self.config, vocab_size, saved.model, f"{name}/model.safetensors")
        try:
            if averaged_steps is not None:
                own = saved.model | _part(saved, "weights")
                check_weights(self.config, vocab_size, own, f"{name}/training.safetensors")
                self.averaging.load(saved.model, averaged_steps)
            load_weights(self.model, own)
            set_optimizer_tensors(self.optimizers, self.model, _part(saved, "optimizer"))
        except (KeyError, RuntimeError, TypeError):
            raise ArtefactError(f"{name}: training.safetensors is not of this run") from None

    def roll_back(self, step: int, notify: Callable[[str], None]) -> None:
        """Take up the weights, their average and the optimizer of a step that was saved; all else goes on."""
        try:
            saved = checkpoint.load(self.run.checkpoints, step)
            self._load(saved, TrainingState.from_json(saved.state["training"]).averaged_steps)
        except (ArtefactError, KeyError, TypeError, ValueError) as error:
            notify(f"warning: going on from the weights as they are: {error}")

    def _compare(self, begun_in: dict[str, Any], notify: Callable[[str], None]) -> None:
        here = environment(self.device)
        for key in ("torch", "device", "num_threads"):
            if here[key] != begun_in.get(key):
                notify(
                    f"note: {key} is {here[key]}, was {begun_in.get(key)}: the result is no longer bit-identical to an "
                    "uninterrupted run's"
                )


def _part(saved: checkpoint.Checkpoint, name: str) -> dict[str, Tensor]:
    """The tensors of one part of what training keeps."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in saved.training.items() if key.startswith(prefix)}


def check_unchanged(saved: Config, config: Config) -> None:
    """A resumed run goes on with the settings it was begun with."""
    faults = []
    before, now = flatten(saved.model_dump()), flatten(config.model_dump())
    for key, value in now.items():
        free = any(key == part or key.startswith(part + ".") for part in MAY_CHANGE)
        if value != before[key] and not free:
            faults.append(f"{key}: the run was begun with {before[key]!r}, not {value!r}; it can't change in a resume")
    if faults:
        raise ConfigError(*faults)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.cell": "lstm", ...}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
