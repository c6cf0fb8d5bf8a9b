"""What a run needs to go on as if it had never been stopped, and the way of it into checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lmtrain import checkpoint
from lmtrain.config import Config
from lmtrain.errors import ArtefactError, ConfigError, DataError
from lmtrain.model.language_model import LanguageModel
from lmtrain.run import RunDirectory, load_weights, weights
from lmtrain.runtime import environment, random_state, set_random_state
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
    validated_step: int = 0
    elapsed_s: float = 0.0
    finished: bool = False
    precision: str = "fp32"
    window: Window = field(default_factory=Window)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> TrainingState:
        return cls(**{**state, "window": Window(**state["window"])})


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
        optimizer: Optimizer,
        device: torch.device,
        data_hashes: dict[str, str],
        keep: int,
    ) -> None:
        self.run, self.model, self.optimizer, self.device = run, model, optimizer, device
        self.data_hashes, self.keep = data_hashes, keep

    def save(self, state: TrainingState, lengths: dict[str, int], begun_in: dict[str, Any]) -> None:
        """Save the run as it stands, then remove what is older than the newest `keep` and not the best."""
        content = {
            "training": asdict(state),
            "lengths": lengths,
            "data": self.data_hashes,
            "environment": begun_in,
        }
        own = optimizer_tensors(self.optimizer, self.model)
        training = {f"optimizer/{name}": value for name, value in own.items()} | random_state(self.device)
        checkpoints = self.run.checkpoints
        checkpoint.save(checkpoints, checkpoint.Checkpoint(state.step, weights(self.model), training, content))
        self._point(state)
        saved = checkpoint.steps(checkpoints)
        for old in set(saved) - {*saved[: self.keep], state.step, state.best_step}:
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
        for problem in problems:
            notify(f"passed over: {problem}")
        if saved is None:
            return None
        name = str(checkpoint.home_of(self.run.checkpoints, saved.step))
        try:
            state = TrainingState.from_json(saved.state["training"])
            restored = Restored(state, dict(saved.state["lengths"]), dict(saved.state["environment"]))
            hashes = dict(saved.state["data"])
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{name}: state.json is not a training state") from None
        for path, before in hashes.items():
            if self.data_hashes.get(path) != before:
                raise DataError(f"{path}: changed since the run was begun; put it back, or train a new run")
        load_weights(self.model, saved.model, f"{name}/model.safetensors")
        prefix = "optimizer/"
        own = {key.removeprefix(prefix): value for key, value in saved.training.items() if key.startswith(prefix)}
        set_optimizer_tensors(self.optimizer, self.model, own)
        set_random_state(saved.training, self.device)
        self._point(state)  # killed between a save and its pointers, a run catches up here
        self._compare(restored.environment, notify)
        notify(f"resumed from step {saved.step}")
        return restored

    def _compare(self, begun_in: dict[str, Any], notify: Callable[[str], None]) -> None:
        here = environment(self.device)
        for key in ("torch", "device", "num_threads"):
            if here[key] != begun_in.get(key):
                notify(
                    f"note: {key} is {here[key]}, was {begun_in.get(key)}: the result is no longer bit-identical to an "
                    "uninterrupted run's"
                )


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
