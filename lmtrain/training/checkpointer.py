"""Saves the checkpoints of a run, and restores the run from them as if it had never been stopped."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.preparation import Corpora
from lmtrain.errors import ArtefactError, ConfigError, DataError, DivergedError
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.environment import environment
from lmtrain.runs.ngram_counts import COUNTS_FILE, dump_counts
from lmtrain.runs.weights import load_weights, named_weights
from lmtrain.system.device import random_state, seed_generators, seed_of, set_random_state
from lmtrain.system.files import hash_of, write_atomically
from lmtrain.system.processes import SingleProcess
from lmtrain.training.averaging import averaged_weights
from lmtrain.training.optimization import optimizer_tensors, set_optimizer_tensors
from lmtrain.training.state import LoadedCheckpoint, TrainingState, part_of, read_saved
from lmtrain.training.step import TrainingStep

# what may differ when a run is resumed: where it ends, what it shows and keeps, where things lie
MAY_CHANGE = (
    "name", "runs_dir", "data.test", "data.cache_dir", "training.max_epochs", "training.max_steps",
    "training.max_minutes", "training.patience", "training.device", "training.num_threads", "checkpoint", "logging",
    "validation", "generation",
)  # fmt: skip


class Checkpointer:
    """The checkpoints of one run: what is saved in them, which are kept, and how the run is restored.

    Args:
        counts: the counted n-grams of the model, if it has any.
    """

    def __init__(
        self,
        run: RunDirectory,
        step: TrainingStep,
        corpora: Corpora,
        config: Config,
        processes: SingleProcess,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.run, self.step, self.corpora, self.config, self.processes = run, step, corpora, config, processes
        self.model, self.device = step.model, step.device
        self._counts = None if counts is None or processes.rank else dump_counts(counts)
        self.counts_digest = None if self._counts is None else hash_of(self._counts)

    def write_counts(self) -> None:
        """Write the file of counted n-grams if it is missing or damaged, once nothing prevents the run from
        starting."""
        path = self.run.path / COUNTS_FILE
        if self._counts is not None and not (path.is_file() and hash_of(path.read_bytes()) == self.counts_digest):
            write_atomically(path, self._counts)
        self._counts = None

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
        if not all(bool(torch.isfinite(weight).all()) for weight in named_weights(self.model).values()):
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

    def restore(self, notify: Callable[[str], None]) -> LoadedCheckpoint | None:
        """Restore the run from its newest whole checkpoint; returns it, or None if there is no checkpoint.

        Raises:
            DataError: the training text has changed.
            ArtefactError: there are checkpoints, but none is whole and of this run.
        """
        saved = self._read_and_share(lambda: self._newest(notify))
        if saved is None:
            return None
        self._load(saved)
        carried = self.step.carried
        try:
            if carried is not None:
                rows = slice(self.processes.rank * carried.columns, (self.processes.rank + 1) * carried.columns)
                tensors = part_of(saved.training, "carried")
                carried.load({name: part[rows] for name, part in tensors.items()}, self.device)
            self._restore_random_state(saved)
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise ArtefactError(f"{saved.name}/training.safetensors: not of this run") from None
        if self.processes.rank == 0:
            self._point(saved.state)  # a run that was killed between a save and its pointers catches up here
        self._note_differences(saved.environment, notify)
        notify(f"resumed from step {saved.state.step}")
        return saved

    def _newest(self, notify: Callable[[str], None]) -> LoadedCheckpoint | None:
        """The newest whole checkpoint of this run and of its text; raises as `restore`."""
        checkpoint.remove_leftovers(self.run.checkpoints)
        saved = checkpoint.load_first_whole(
            checkpoint.steps(self.run.checkpoints),
            lambda step: read_saved(self.run, self.config, self.corpora.tokenizer, step),
            notify,
        )
        if saved is None:
            return None
        for path in sorted(saved.data.keys() | self.corpora.hashes.keys()):
            if self.corpora.hashes.get(path) != saved.data.get(path):
                raise DataError(f"{path}: changed since the run was begun; put it back, or train a new run")
        if saved.counts != self.counts_digest:
            raise ArtefactError(f"{saved.name}: was trained with other n-gram counts than this lmtrain makes")
        return saved

    def _read_and_share(self, read: Callable[[], LoadedCheckpoint | None]) -> LoadedCheckpoint | None:
        """Read a checkpoint in rank 0 and give it to every process: others may be on machines that can't see the run
        directory."""
        processes = self.processes
        saved = processes.run_in_all(lambda: read() if processes.rank == 0 else None, rank_0_first=True)
        facts = None if saved is None else [saved.name, asdict(saved.state), saved.environment]
        if (shared := processes.broadcast(facts)) is None:
            return None
        name, state, begun_in = shared
        model = processes.broadcast_tensors({} if saved is None else saved.model)
        training = processes.broadcast_tensors({} if saved is None else saved.training)
        return saved or LoadedCheckpoint(name, model, training, TrainingState.from_json(state), {}, begun_in, {})

    def _restore_random_state(self, saved: LoadedCheckpoint) -> None:
        """Restore this process's random state; a rank that saved none gets a seed that no other process has."""
        rank = self.processes.rank
        if rank == 0:
            set_random_state(saved.training, self.device)
        elif f"cpu/{rank}" in saved.training:
            names = {name: f"{name}/{rank}" for name in random_state(self.device)}  # a run on the CPU saved no device's
            own = {name: saved.training[key] for name, key in names.items() if key in saved.training}
            set_random_state(own, self.device)
        else:
            seed_generators(seed_of(self.config.seed, saved.state.step, rank), self.device)

    def _load(self, saved: LoadedCheckpoint) -> None:
        """Load the weights, their average and the state of the optimizers."""
        weights, averaged_steps = saved.model, saved.state.averaged_steps
        try:
            if averaged_steps is not None:
                weights = saved.model | part_of(saved.training, "weights")
                self.step.averaging.load(saved.model, averaged_steps)
            load_weights(self.model, weights)
            set_optimizer_tensors(self.step.optimizers, self.model, part_of(saved.training, "optimizer"))
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise ArtefactError(f"{saved.name}/training.safetensors: not of this run") from None

    def roll_back(self, step: int, notify: Callable[[str], None]) -> None:
        """Load the weights, their average and the optimizer state that were saved at a step; nothing else changes."""

        def read() -> LoadedCheckpoint | None:
            try:
                return read_saved(self.run, self.config, self.corpora.tokenizer, step)
            except ArtefactError as error:
                notify(f"warning: continuing with the weights as they are: {error}")
                return None

        if (saved := self._read_and_share(read)) is not None:
            self._load(saved)

    def _note_differences(self, begun_in: dict[str, Any], notify: Callable[[str], None]) -> None:
        """Say what differs from the environment in which the run was begun."""
        here = environment(self.device, self.processes.world_size)
        for key in ("torch", "device", "num_threads", "processes"):
            if here[key] != begun_in.get(key):
                notify(
                    f"note: {key} is {here[key]}, was {begun_in.get(key)}: the result is no longer bit-identical to an "
                    "uninterrupted run's"
                )


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
