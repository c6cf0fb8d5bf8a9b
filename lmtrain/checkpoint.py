"""Checkpoints on disk: whole or not there, never half, never a pickle.

A checkpoint is a directory `step-00000500` with `model.safetensors`, `training.safetensors`, `state.json` and
`manifest.json`, which holds the size and SHA-256 of the others. It is written beside its place, synced, renamed into
place, and the parent synced: a process killed at any instant, or a power cut, leaves the checkpoints before it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lmtrain.errors import ArtefactError, StorageError

FORMAT = 1
FILES = ("model.safetensors", "training.safetensors", "state.json")
LARGEST_JSON_BYTES = 16 << 20
REPLACED = ".replaced"  # a checkpoint that stood where a new one is being put


class NewerFormatError(ArtefactError):
    """A checkpoint that a later lmtrain wrote: nothing to pass over, but a reason to stop."""


class Checkpoint(NamedTuple):
    """What a save keeps."""

    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]  # optimizer and random state
    state: dict[str, Any]  # JSON: counters, place in the data, metric files


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash either the old content or the new one is there, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")  # two processes may write the same cache file
    try:
        _write_synced(beside, content)
        beside.rename(path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def _write_synced(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with open(path, "xb") as handle:  # never through a link
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Make renames within a directory last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    contents = {
        "model.safetensors": safetensors.torch.save(_plain(checkpoint.model)),
        "training.safetensors": safetensors.torch.save(_plain(checkpoint.training)),
        "state.json": _json(checkpoint.state),
    }
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "files": {name: {"bytes": len(data), "sha256": _hash(data)} for name, data in contents.items()},
    }
    contents["manifest.json"] = _json(manifest)
    home = home_of(checkpoints, checkpoint.step)
    beside = home.with_name(f".{home.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, data in contents.items():
            _write_synced(beside / name, data)
        sync_directory(beside)
        replaced = home.with_name(f".{home.name}{REPLACED}")
        if home.exists():  # the same step again: at the end of a run, or after a broken one was passed over
            home.rename(replaced)
        beside.rename(home)
        sync_directory(checkpoints)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        remove_leftovers(checkpoints)
        size = sum(map(len, contents.values()))
        raise StorageError(
            f"{home}: the save failed: {(error.strerror or str(error)).lower()}; a checkpoint takes {size:,} bytes; "
            "what was saved before is whole, and --resume goes on from it"
        ) from None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def remove(checkpoints: Path, step: int) -> None:
    """Remove a checkpoint; killed in between, it leaves nothing that looks like one."""
    home = home_of(checkpoints, step)
    doomed = home.with_name(f".{home.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    home.rename(doomed)
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


def load(checkpoints: Path, step: int, parts: tuple[str, ...] = FILES) -> Checkpoint:
    """Read a checkpoint, or the named parts of it, and verify every byte of them.

    Raises:
        ArtefactError: anything that is not as it was saved.
    """
    home = home_of(checkpoints, step)
    manifest = _read_json(home / "manifest.json", _read(home / "manifest.json", LARGEST_JSON_BYTES))
    _check_manifest(home, manifest)
    contents = {}
    for name in parts:
        entry = manifest["files"][name]
        data = _read(home / name, entry["bytes"])
        if len(data) != entry["bytes"] or _hash(data) != entry["sha256"]:
            raise ArtefactError(f"{home / name}: damaged: not the bytes that were saved")
        contents[name] = data
    state = _read_json(home / "state.json", contents["state.json"]) if "state.json" in contents else {}
    return Checkpoint(
        step,
        _tensors(home / "model.safetensors", contents.get("model.safetensors")),
        _tensors(home / "training.safetensors", contents.get("training.safetensors")),
        state,
    )


def _check_manifest(home: Path, manifest: dict[str, Any]) -> None:
    path = home / "manifest.json"
    if not isinstance(manifest.get("format"), int) or not isinstance(manifest.get("files"), dict):
        raise ArtefactError(f"{path}: not a manifest")
    if manifest["format"] > FORMAT:
        raise NewerFormatError(f"{path}: format {manifest['format']} is newer than this lmtrain's; upgrade lmtrain")
    if set(manifest["files"]) != set(FILES):
        raise ArtefactError(f"{path}: names other files than {', '.join(FILES)}")
    for name, entry in manifest["files"].items():
        right = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not right or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
            raise ArtefactError(f"{path}: {name}: no size or hash")


def _read(path: Path, most: int) -> bytes:
    """A regular file's bytes, no link, at most `most` + 1 of them."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtefactError(f"{path}: not a regular file")
        with open(path, "rb") as handle:
            return handle.read(min(most, path.stat().st_size) + 1)
    except OSError as error:
        raise ArtefactError(f"{path}: {(error.strerror or 'can not be read').lower()}") from None


def _read_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ArtefactError(f"{path}: damaged: not JSON") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: damaged: not a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a run directory.

    Raises:
        ArtefactError: missing, not a regular file, or not a JSON object.
    """
    return _read_json(path, _read(path, LARGEST_JSON_BYTES))


def read_text(path: Path) -> str:
    """A text file out of a run directory; raises ArtefactError as `read_json`."""
    try:
        return _read(path, 1 << 30).decode()
    except UnicodeDecodeError:
        raise ArtefactError(f"{path}: damaged: not UTF-8") from None


def _tensors(path: Path, data: bytes | None) -> dict[str, Tensor]:
    if data is None:
        return {}
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: not a safetensors file: {str(error)[:100]}") from None


def newest_whole(checkpoints: Path, problems: list[str]) -> Iterator[Checkpoint]:
    """The whole checkpoints, newest first; what is wrong with the ones passed over goes to `problems`.

    Raises:
        NewerFormatError: one that a later lmtrain wrote.
    """
    for step in steps(checkpoints):
        try:
            yield load(checkpoints, step)
        except NewerFormatError:
            raise
        except ArtefactError as error:
            problems.extend(error.faults)
