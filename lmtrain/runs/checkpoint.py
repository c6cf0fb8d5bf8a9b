"""What a checkpoint holds, and how it is written and read. A checkpoint is never half written and never a pickle.

A checkpoint is a directory such as `step-00000500` with `model.safetensors`, `training.safetensors`, `state.json` and
`manifest.json`. The manifest holds the size in bytes and the SHA-256 of each other file, and its own SHA-256 as a seal.
`save` writes the directory under a temporary name, syncs it, renames it, and syncs the parent directory. A process that
is killed at any moment, or a power cut, therefore leaves the earlier checkpoints whole.

`read_headers` checks what a checkpoint claims before any tensor is read: each file has the size that its manifest says,
and the header of a safetensors file names the shape of every tensor. The check needs no torch, little memory and little
time. Tensors are written and read piece by piece, see `tensor_file.py`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lmtrain.errors import ArtefactError, StorageError
from lmtrain.runs.tensor_file import SavedFile, pieces_of, read_header, size_of
from lmtrain.system.console import Notify
from lmtrain.system.files import (
    dump_json,
    move,
    open_regular,
    read_sealed,
    reason_of,
    sealed,
    space_note,
    sync_directory,
    write_pieces,
    write_synced,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CHECKPOINT_FORMAT = 1
MODEL_FILE, TRAINING_FILE, STATE_FILE = "model.safetensors", "training.safetensors", "state.json"
FILES = (MODEL_FILE, TRAINING_FILE, STATE_FILE)
INFERENCE_FILES = (MODEL_FILE, STATE_FILE)  # those that inference reads
REPLACED = ".replaced"  # suffix of an old checkpoint while a new one of the same step takes its place


class NewerFormatError(ArtefactError):
    """A later lmtrain wrote this checkpoint. It is not damaged, so loading stops instead of trying an older one."""


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # optimizer state, random state, carried hidden states, weights beside their average
    state: dict[str, Any]  # JSON: counters, position in the data, lengths of the metric files


def directory_of(checkpoints: Path, step: int) -> Path:
    """Return the directory of the checkpoint of a step.

    If a process was killed before the new checkpoint of a step took the place of the old one, that is the old one's.
    """
    directory = _place_of(checkpoints, step)
    replaced = _replaced(directory)
    return replaced if replaced.exists() and not directory.exists() else directory


def _place_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def _replaced(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{REPLACED}")


def steps(checkpoints: Path) -> list[int]:
    """List the steps that have a checkpoint directory, whole or damaged, newest first."""
    paths = [*checkpoints.glob("step-*"), *checkpoints.glob(f".step-*{REPLACED}")]
    names = [path.name.removeprefix(".").removesuffix(REPLACED).removeprefix("step-") for path in paths]
    numbers = {int(name) for name in names if re.fullmatch("[0-9]{8,18}", name)}
    return sorted((step for step in numbers if directory_of(checkpoints, step).exists()), reverse=True)


def save(checkpoints: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to the disk itself, so that it survives a power cut once this function returns.

    If the disk is full, or the file system has another fault, it raises StorageError and leaves nothing half written.
    """
    state = dump_json(checkpoint.state)
    directory = _place_of(checkpoints, checkpoint.step)
    temporary = directory.with_name(f".{directory.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        contents = {
            MODEL_FILE: pieces_of(checkpoint.model), TRAINING_FILE: pieces_of(checkpoint.training), STATE_FILE: [state]
        }  # fmt: skip
        files = {}
        for name, pieces in contents.items():
            size, digest = write_pieces(temporary / name, pieces)
            files[name] = {"bytes": size, "sha256": digest}
        manifest = {"format": CHECKPOINT_FORMAT, "step": checkpoint.step, "files": files}
        write_synced(temporary / "manifest.json", sealed(manifest))
        sync_directory(temporary)
        replaced = _replaced(directory)
        if directory.exists():  # the last step of a run is saved twice, and a damaged checkpoint is written again
            move(directory, replaced)
        move(temporary, directory)
        sync_directory(checkpoints)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        with suppress(OSError):
            remove_leftovers(checkpoints)
        needed = size_of(checkpoint.model) + size_of(checkpoint.training) + len(state)
        raise StorageError(
            f"{directory}: the save failed: {reason_of(error)}{space_note(checkpoints, needed)}; earlier checkpoints "
            "are whole, and --resume continues from them"
        ) from None


def remove(checkpoints: Path, step: int) -> None:
    """Remove a checkpoint; raises StorageError if the file system refuses.

    A process that is killed meanwhile leaves nothing that looks like a checkpoint.
    """
    directory = _place_of(checkpoints, step)
    renamed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(renamed, ignore_errors=True)
    try:
        move(directory, renamed)
    except OSError as error:
        raise StorageError(f"{directory}: can't be removed: {reason_of(error)}") from None
    shutil.rmtree(renamed, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed saves and removals left, after putting back a checkpoint whose replacement never came."""
    for path in checkpoints.glob(f".step-*{REPLACED}"):
        directory = path.with_name(path.name[1:].removesuffix(REPLACED))
        if not directory.exists():
            move(path, directory)
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.parent.glob(".*.new"):
        path.unlink(missing_ok=True)


def read_headers(checkpoints: Path, step: int, parts: tuple[str, ...] = FILES) -> dict[str, SavedFile]:
    """Check the sizes of the named files of a checkpoint, and read what their headers say.

    Returns:
        The size, hash and tensor headers of each file, by its name.

    Raises:
        ArtefactError: the manifest is damaged, or a file has another size, or is not a safetensors file.
    """
    directory = directory_of(checkpoints, step)
    files = _read_manifest(directory, step)
    found = {}
    for name in parts:
        path, size, specs = directory / name, files[name]["bytes"], {}
        with open_regular(path) as handle:
            if os.fstat(handle.fileno()).st_size != size:
                raise ArtefactError(f"{path}: damaged: not the bytes that were saved")
            if path.suffix == ".safetensors":
                specs = read_header(path, handle, size)
                if handle.tell() + sum(spec.size_bytes for spec in specs.values()) != size:
                    raise ArtefactError(f"{path}: not a safetensors file")
        found[name] = SavedFile(path, size, files[name]["sha256"], specs)
    return found


def load(checkpoints: Path, step: int) -> Checkpoint:
    """Read a whole checkpoint into memory; raises ArtefactError if any byte is not as it was saved."""
    files = read_headers(checkpoints, step)
    model, training = (
        {key: spec.empty() for key, spec in files[name].specs.items()} for name in (MODEL_FILE, TRAINING_FILE)
    )
    files[MODEL_FILE].read_tensors(model)
    files[TRAINING_FILE].read_tensors(training)
    return Checkpoint(step, model, training, files[STATE_FILE].read_json())


def load_first_whole(
    candidates: Iterable[int], read: Callable[[int], T], notify: Notify = lambda line: None
) -> T | None:
    """Read the first checkpoint that is whole, and tell the user which damaged ones were skipped before it.

    Args:
        candidates: the steps to try, in this order.
        read: reads the checkpoint of a step, and raises ArtefactError if the checkpoint can't be used.

    Returns:
        What `read` returned; None if there are no steps.

    Raises:
        ArtefactError: there are checkpoints, and none can be used.
        NewerFormatError: a later lmtrain wrote one of those that were tried.
    """
    faults: list[str] = []
    for step in candidates:
        try:
            result = read(step)
        except NewerFormatError:
            raise
        except ArtefactError as error:
            faults.extend(error.faults)
            continue
        for fault in faults:
            notify(f"skipped: {fault}")
        return result
    if not faults:
        return None
    remedy = "no checkpoint can be used: restore the run from a backup, or train a new one"
    raise ArtefactError(*faults[:-1], f"{faults[-1]}; {remedy}")


def _read_manifest(directory: Path, step: int) -> dict[str, Any]:
    """Read the size and hash of each file of a checkpoint."""
    path = directory / "manifest.json"
    manifest = read_sealed(path)
    format, files = manifest.get("format"), manifest.get("files")
    if type(format) is int and format > CHECKPOINT_FORMAT:
        raise NewerFormatError(f"{path}: format {format} is newer than this lmtrain's; upgrade lmtrain")
    if format != CHECKPOINT_FORMAT or not isinstance(files, dict) or manifest.get("step") != step:
        raise ArtefactError(f"{path}: not a manifest of step {step}")
    if set(files) != set(FILES):
        raise ArtefactError(f"{path}: names other files than {', '.join(FILES)}")
    for name, entry in files.items():
        has_hash = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not has_hash or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
            raise ArtefactError(f"{path}: {name}: no size or hash")
    return files
