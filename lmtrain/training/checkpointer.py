"""Saves the checkpoints of a run, and restores the run from them as if it had never been stopped."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.preparation import Corpora
from lmtrain.errors import ArtefactError, ConfigError, DataError, DivergedError
from lmtrain.runs import checkpoint
from lmtrain.runs.checkpoint import MODEL_FILE, TRAINING_FILE
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.environment import environment
from lmtrain.runs.weights import is_finite, named_weights
from lmtrain.system.device import random_state, seed_generators, seed_of, set_random_state
from lmtrain.system.processes import SingleProcess
from lmtrain.training.averaging import averaged_weights
from lmtrain.training.optimization import optimizer_tensors, set_optimizer_tensors
from lmtrain.training.state import SavedCheckpoint, TrainingState, open_checkpoint, part_of
from lmtrain.training.step import TrainingStep

# what may differ when a run is resumed: where it ends, what it shows and keeps, where things lie
MAY_CHANGE = (
    "name", "runs_dir", "data.test", "data.cache_dir", "training.max_epochs", "training.max_steps",
    "training.max_minutes", "training.patience", "training.device", "training.num_threads", "checkpoint", "logging",
    "validation", "generation",
)  # fmt: skip


class Checkpointer:
    """The checkpoints of one run: what is saved in them, which are kept, and how the run is restored.

    Attributes:
        counts_digest: SHA-256 of the file of counted n-grams, if the model has any; set it before the first save.
    """

    counts_digest: str | None = None

    def __init__(
        self,
        run: RunDirectory,
        step: TrainingStep,
        corpora: Corpora,
        config: Config,
        processes: SingleProcess,
    ) -> None:
        self.run, self.step, self.corpora, self.config, self.processes = run, step, corpora, config, processes
        self.model, self.device = step.model, step.device

    def save(self, state: TrainingState, lengths: dict[str, int], begun_in: dict[str, Any]) -> None:
        """Save the run as it stands, then remove checkpoints that are neither among the newest `keep` nor the best.

        Rank 0 saves. The other processes give it what only they have: carried hidden state and random state. The model
        that is saved is the average of the weights, if there is one; the weights that are trained stand beside it.

        Args:
            lengths: bytes of each metric file.
            begun_in: the environment in which the run was begun.
        """
        averaging = self.step.averaging
        state.averaged_steps = averaging.steps if averaging.active else None
        content = {
            "training": asdict(state),
            "lengths": lengths,
            "data": self.corpora.hashes,
            "tokenizer": self.corpora.tokenizer.fingerprint(),
            "environment": begun_in,
            **({} if self.counts_digest is None else {"counts": self.counts_digest}),
        }
        if not all(map(is_finite, named_weights(self.model).values())):
            raise DivergedError(f"step {state.step}: a weight is not finite; try a lower optimizer.lr")
        carried = {} if self.step.carried is None else self.step.carried.tensors()
        carried = {name: torch.cat(self.processes.gather_tensor(part.cpu())) for name, part in carried.items()}
        random = {
            name if rank == 0 else f"{name}/{rank}": state
            for name, own in random_state(self.device).items()
            for rank, state in enumerate(self.processes.gather_tensor(own))
        }
        if self.processes.rank:
            return
        parts = {
            "optimizer": optimizer_tensors(self.step.optimizers, self.model),
            "carried": carried,
            "weights": averaged_weights(self.model) if averaging.active else {},
        }
        training = {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
        training |= random
        saved_model = named_weights(self.model) | averaging.averages
        checkpoints = self.run.checkpoints
        checkpoint.save(checkpoints, checkpoint.Checkpoint(state.step, saved_model, training, content))
        self._point(state)
        saved = [step for step in checkpoint.steps(checkpoints) if step <= state.step]  # newer ones were damaged
        for old in set(saved) - {*saved[: self.config.checkpoint.keep], state.best_step}:
            checkpoint.remove(checkpoints, old)

    def _point(self, state: TrainingState) -> None:
        """Have `best.json` and `last.json` name the checkpoints of this state."""
        if state.best_step is not None and self.run.read_pointer("best") != state.best_step:
            self.run.write_pointer("best", {"step": state.best_step, "valid_loss": state.best_loss})
        self.run.write_pointer("last", {"step": state.step})

    def restore(self, notify: Callable[[str], None]) -> SavedCheckpoint | None:
        """Restore the run from its newest whole checkpoint; returns it, or None if there is no checkpoint.

        Raises:
            DataError: the training text has changed.
            ArtefactError: there are checkpoints, but none is whole and of this run.
        """
        loaded = self._load_and_share(lambda: self._newest(notify))
        if loaded is None:
            return None
        saved, tensors = loaded
        carried = self.step.carried
        try:
            if carried is not None:
                rows = slice(self.processes.rank * carried.columns, (self.processes.rank + 1) * carried.columns)
                parts = part_of(tensors, "carried")
                carried.load({name: part[rows] for name, part in parts.items()}, self.device)
            self._restore_random_state(saved.state.step, tensors)
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise _foreign(saved) from None
        if self.processes.rank == 0:
            self._point(saved.state)  # a run that was killed between a save and its pointers catches up here
        self._note_differences(saved.environment, notify)
        notify(f"resumed from step {saved.state.step}")
        return saved

    def roll_back(self, step: int, notify: Callable[[str], None]) -> None:
        """Load the weights, their average and the optimizer state that were saved at a step; nothing else changes."""

        def read() -> tuple[SavedCheckpoint, dict[str, Tensor]] | None:
            try:
                saved = open_checkpoint(self.run, self.config, self.corpora.tokenizer, step)
                saved.read_tensors({})  # all is checked before a weight changes
            except ArtefactError as error:
                notify(f"warning: continuing with the weights as they are: {error}")
                return None
            return saved, self._load(saved)

        self._load_and_share(read)

    def _newest(self, notify: Callable[[str], None]) -> tuple[SavedCheckpoint, dict[str, Tensor]] | None:
        """Load the newest whole checkpoint of this run and of its text, as `_load`; raises as `restore`."""

        def read(step: int) -> tuple[SavedCheckpoint, dict[str, Tensor]]:
            saved = open_checkpoint(self.run, self.config, self.corpora.tokenizer, step)
            return saved, self._load(saved)

        checkpoint.remove_leftovers(self.run.checkpoints)
        loaded = checkpoint.load_first_whole(checkpoint.steps(self.run.checkpoints), read, notify)
        if loaded is None:
            return None
        saved, _ = loaded
        for path in sorted(saved.data.keys() | self.corpora.hashes.keys()):
            if self.corpora.hashes.get(path) != saved.data.get(path):
                raise DataError(f"{path}: changed since the run was begun; put it back, or train a new run")
        return loaded

    def _load(self, saved: SavedCheckpoint) -> dict[str, Tensor]:
        """Read the weights and their average in place, and all other tensors beside them; returns all, by name.

        Raises:
            ArtefactError: the checkpoint is damaged; the weights must not be used then.
        """
        tensors = self._destinations(saved.state.averaged_steps)
        specs = saved.files[MODEL_FILE].specs | saved.files[TRAINING_FILE].specs
        if not tensors.keys() <= specs.keys():
            raise _foreign(saved)
        tensors |= {name: spec.empty(self.device) for name, spec in specs.items() if name not in tensors}
        saved.read_tensors(tensors)
        return tensors

    def _destinations(self, averaged_steps: int | None) -> dict[str, Tensor]:
        """Return where the saved weights and their average go, by the names of `SavedCheckpoint.read_tensors`. The
        optimizers give up their state, so that there is memory for the saved one."""
        for optimizer in self.step.optimizers:
            optimizer.state.clear()
        averaging = self.step.averaging
        averaging.resume(averaged_steps)
        destinations = named_weights(self.model)
        if averaging.active:
            beside = {f"weights/{name}": weight for name, weight in averaged_weights(self.model).items()}
            destinations = destinations | beside | averaging.averages
        return {name: tensor.detach() for name, tensor in destinations.items()}

    def _load_and_share(
        self, load: Callable[[], tuple[SavedCheckpoint, dict[str, Tensor]] | None]
    ) -> tuple[SavedCheckpoint, dict[str, Tensor]] | None:
        """Load a checkpoint in rank 0, and give it to every process: others may be on machines that can't see the run
        directory. Afterwards the optimizers have their state. The names are those of `_load`."""
        processes = self.processes
        loaded = processes.run_in_all(lambda: load() if processes.rank == 0 else None, rank_0_first=True)
        saved, tensors = loaded or (None, {})
        facts = None if saved is None else [saved.name, asdict(saved.state), saved.environment]
        if (shared := processes.broadcast(facts)) is None:
            return None
        if saved is None:
            name, state, begun_in = shared
            saved = SavedCheckpoint(name, {}, TrainingState.from_json(state), {}, begun_in, {})
            tensors = self._destinations(saved.state.averaged_steps)
        for name, tensor in processes.broadcast_tensors(tensors):
            if name not in tensors:
                tensors[name] = tensor
            elif processes.rank:
                tensors[name].copy_(tensor)
        try:
            set_optimizer_tensors(self.step.optimizers, self.model, part_of(tensors, "optimizer"))
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise _foreign(saved) from None
        return saved, tensors

    def _restore_random_state(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Restore this process's random state; a rank that saved none gets a seed that no other process has."""
        rank = self.processes.rank
        if rank == 0:
            set_random_state(tensors, self.device)
        elif f"cpu/{rank}" in tensors:
            names = {name: f"{name}/{rank}" for name in random_state(self.device)}  # a run on the CPU saved no device's
            set_random_state({name: tensors[key] for name, key in names.items() if key in tensors}, self.device)
        else:
            seed_generators(seed_of(self.config.seed, step, rank), self.device)

    def _note_differences(self, begun_in: dict[str, Any], notify: Callable[[str], None]) -> None:
        """Say what differs from the environment in which the run was begun."""
        here = environment(self.device, self.processes.world_size)
        for key in ("torch", "device", "num_threads", "processes"):
            if here[key] != begun_in.get(key):
                notify(
                    f"note: {key} is {here[key]}, was {begun_in.get(key)}: the result is no longer bit-identical to an "
                    "uninterrupted run's"
                )


def _foreign(saved: SavedCheckpoint) -> ArtefactError:
    return ArtefactError(f"{saved.name}/{TRAINING_FILE}: not of this run")


def check_unchanged(saved: Config, config: Config) -> None:
    """Raise ConfigError with every key that differs from the run's own and may not change in a resume."""
    faults = []
    before, now = flatten_keys(saved.model_dump()), flatten_keys(config.model_dump())
    for key, value in now.items():
        free = any(key == part or key.startswith(part + ".") for part in MAY_CHANGE)
        if value != before[key] and not free:
            faults.append(f"{key}: the run was begun with {before[key]!r}, not {value!r}; it can't change in a resume")
    if faults:
        raise ConfigError(*faults)


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration by dotted keys: {"model.cell": "lstm", ...}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
