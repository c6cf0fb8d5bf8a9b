"""What a run needs to go on as if it had never been stopped, and the way of it into checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch.optim import Optimizer

from lmtrain import checkpoint
from lmtrain.config import Config
from lmtrain.data.preparation import Corpora
from lmtrain.errors import ArtefactError, ConfigError, DataError, DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.run import RunDirectory, check_tokenizer, check_weights, load_weights, weights
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
        optimizer: Optimizer,
        device: torch.device,
        corpora: Corpora,
        config: Config,
    ) -> None:
        self.run, self.model, self.optimizer, self.device = run, model, optimizer, device
        self.corpora, self.config = corpora, config

    def save(self, state: TrainingState, lengths: dict[str, int], begun_in: dict[str, Any]) -> None:
        """Save the run as it stands, then remove what is older than the newest `keep` and not the best."""
        content = {
            "training": asdict(state),
            "lengths": lengths,
            "data": self.corpora.hashes,
            "tokenizer": self.corpora.tokenizer.fingerprint(),
            "environment": begun_in,
        }
        if not all(bool(torch.isfinite(weight).all()) for weight in weights(self.model).values()):
            raise DivergedError(f"step {state.step}: a weight is not finite; try a lower optimizer.lr")
        own = optimizer_tensors(self.optimizer, self.model)
        training = {f"optimizer/{name}": value for name, value in own.items()} | random_state(self.device)
        checkpoints = self.run.checkpoints
        checkpoint.save(checkpoints, checkpoint.Checkpoint(state.step, weights(self.model), training, content))
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
        check_weights(self.config, self.corpora.tokenizer.vocab_size, saved.model, f"{name}/model.safetensors")
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
        load_weights(self.model, saved.model)
        prefix = "optimizer/"
        own = {key.removeprefix(prefix): value for key, value in saved.training.items() if key.startswith(prefix)}
        try:
            set_optimizer_tensors(self.optimizer, self.model, own)
            set_random_state(saved.training, self.device)
        except (KeyError, RuntimeError, TypeError):
            raise ArtefactError(f"{name}: training.safetensors is not of this run") from None
        self._point(restored.state)  # killed between a save and its pointers, a run catches up here
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
