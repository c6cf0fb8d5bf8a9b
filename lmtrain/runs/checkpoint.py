"""Checkpoints on disk: whole or not there, never half, never a pickle.

A checkpoint is a directory `step-00000500` with `model.safetensors`, `training.safetensors`, `state.json` and
`manifest.json`, which holds the size and SHA-256 of the others and, as a seal, its own. It is written beside its
place, synced, renamed into place, and the parent synced: a process killed at any instant, or a power cut, leaves the
checkpoints before it whole.

What a directory claims is looked at before its tensors are read: no file is larger than its manifest says, and the
header of a safetensors file names every tensor's shape. That takes no torch, little memory and little time.
"""

from __future__ import annotations

import operator
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from lmtrain.errors import ArtefactError, StorageError
from lmtrain.system.files import (
    LARGEST_JSON_BYTES,
    dump_json,
    hash_of,
    open_regular,
    parse_json,
    read_bytes,
    read_sealed,
    reason_of,
    sealed,
    space_note,
    sync_directory,
    write_synced,
)

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FORMAT = 1
FILES = ("model.safetensors", "training.safetensors", "state.json")
REPLACED = ".replaced"  # a checkpoint that stood where a new one is being put


class NewerFormatError(ArtefactError):
    """A checkpoint that a later lmtrain wrote: nothing to pass over, but a reason to stop."""


class TensorSpec(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str  # as safetensors names it: F32
    shape: tuple[int, ...]


class Checkpoint(NamedTuple):
    """What a save keeps."""

    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # optimizer and random state
    state: dict[str, Any]  # JSON: counters, place in the data, metric files


def home_of(checkpoints: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return checkpoints / f"step-{step:08d}"


def steps(checkpoints: Path) -> list[int]:
    """The steps of which there is a checkpoint directory, newest first, whole or not."""
    numbers = [int(name) for path in checkpoints.glob("step-*") if re.fullmatch("[0-9]{8,18}", name := path.name[5:])]
    return sorted((step for step in numbers if home_of(checkpoints, step).exists()), reverse=True)


def save(checkpoints: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; when this returns, it lasts.

    Raises:
        StorageError: no room, or another fault of the file system; nothing half-written is left.
    """
    import safetensors.torch

    contents = {
        "model.safetensors": safetensors.torch.save(_plain(checkpoint.model)),
        "training.safetensors": safetensors.torch.save(_plain(checkpoint.training)),
        "state.json": dump_json(checkpoint.state),
    }
    manifest = {
        "format": CHECKPOINT_FORMAT,
        "step": checkpoint.step,
        "files": {name: {"bytes": len(data), "sha256": hash_of(data)} for name, data in contents.items()},
    }
    contents["manifest.json"] = sealed(manifest)
    home = home_of(checkpoints, checkpoint.step)
    beside = home.with_name(f".{home.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, data in contents.items():
            write_synced(beside / name, data)
        sync_directory(beside)
        replaced = home.with_name(f".{home.name}{REPLACED}")
        if home.exists():  # the same step again: at the end of a run, or after a broken one was passed over
            home.rename(replaced)
        beside.rename(home)
        sync_directory(checkpoints)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        with suppress(OSError):
            remove_leftovers(checkpoints)
        needed = sum(map(len, contents.values()))
        raise StorageError(
            f"{home}: the save failed: {reason_of(error)}{space_note(checkpoints, needed)}; what was saved before is "
            "whole, and --resume goes on from it"
        ) from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def remove(checkpoints: Path, step: int) -> None:
    """Remove a checkpoint; killed in between, it leaves nothing that looks like one.

    Raises:
        StorageError: it can't be removed.
    """
    home = home_of(checkpoints, step)
    doomed = home.with_name(f".{home.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        home.rename(doomed)
    except OSError as error:
        raise StorageError(f"{home}: can't be removed: {reason_of(error)}") from None
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Tidy up after killed saves and removals: what was about to be replaced comes back, the rest goes."""
    for path in checkpoints.glob(f".step-*{REPLACED}"):
        home = path.with_name(path.name[1:].removesuffix(REPLACED))
        if not home.exists():
            path.rename(home)
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints.parent.glob(".*.new"):
        path.unlink(missing_ok=True)


def read_headers(checkpoints: Path, step: int, parts: tuple[str, ...] = FILES) -> dict[str, dict[str, TensorSpec]]:
    """What the named parts of a checkpoint claim to be: of each safetensors file the kinds of its tensors by name.

    Raises:
        ArtefactError: no whole manifest, or a file that is not of its size, or no safetensors file.
    """
    home = home_of(checkpoints, step)
    kinds = {}
    files = _manifest(home, step)
    for name in parts:
        path = home / name
        with open_regular(path) as handle:
            if os.fstat(handle.fileno()).st_size != files[name]["bytes"]:
                raise ArtefactError(f"{path}: damaged: not the bytes that were saved")
            if path.suffix == ".safetensors":
                kinds[name] = read_header(path, handle, files[name]["bytes"])
    return kinds


def load(checkpoints: Path, step: int, parts: tuple[str, ...] = FILES) -> Checkpoint:
    """Read a checkpoint, or the named parts of it, and verify every byte of them.

    Raises:
        ArtefactError: anything that is not as it was saved.
    """
    home = home_of(checkpoints, step)
    read_headers(checkpoints, step, parts)
    files = _manifest(home, step)
    contents = {}
    for name in parts:
        data = read_bytes(home / name, files[name]["bytes"])
        if hash_of(data) != files[name]["sha256"]:
            raise ArtefactError(f"{home / name}: damaged: not the bytes that were saved")
        contents[name] = data
    state = parse_json(home / "state.json", contents["state.json"]) if "state.json" in contents else {}

    def tensors(name: str) -> dict[str, Tensor]:
        return tensors_in(home / name, contents[name]) if name in contents else {}

    return Checkpoint(step, tensors("model.safetensors"), tensors("training.safetensors"), state)


def _manifest(home: Path, step: int) -> dict[str, Any]:
    """Size and hash of each file of a checkpoint."""
    path = home / "manifest.json"
    manifest = read_sealed(path)
    format, files = manifest.get("format"), manifest.get("files")
    if type(format) is int and format > CHECKPOINT_FORMAT:
        raise NewerFormatError(f"{path}: format {format} is newer than this lmtrain's; upgrade lmtrain")
    if format != CHECKPOINT_FORMAT or not isinstance(files, dict) or manifest.get("step") != step:
        raise ArtefactError(f"{path}: not a manifest of step {step}")
    if set(files) != set(FILES):
        raise ArtefactError(f"{path}: names other files than {', '.join(FILES)}")
    for name, entry in files.items():
        right = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not right or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
            raise ArtefactError(f"{path}: {name}: no size or hash")
    return files


def read_header(path: Path, handle: IO[bytes], size: int) -> dict[str, TensorSpec]:
    """The tensors of an open safetensors file of so many bytes, https://huggingface.co/docs/safetensors: eight bytes
    that say how long the JSON behind them is, which says where in the rest each tensor lies."""
    length = int.from_bytes(handle.read(8), "little")
    if length > min(size, LARGEST_JSON_BYTES):
        raise ArtefactError(f"{path}: not a safetensors file")
    header = parse_json(path, handle.read(length))
    header.pop("__metadata__", None)
    try:
        return {
            name: TensorSpec(str(entry["dtype"]), tuple(map(operator.index, entry["shape"])))
            for name, entry in header.items()
        }
    except (KeyError, TypeError):
        raise ArtefactError(f"{path}: not a safetensors file") from None


def tensors_in(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file's bytes; raises ArtefactError."""
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: not a safetensors file: {str(error)[:100]}") from None
