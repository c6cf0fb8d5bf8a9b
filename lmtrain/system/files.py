"""Single files of ours: written whole or not at all, read within bounds and never through a link."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lmtrain.errors import ArtefactError, StorageError

LARGEST_JSON_BYTES = 16 << 20
LARGEST_TEXT_BYTES = 256 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash either the old content or the new one is there, whole.

    Raises:
        StorageError: no room, or another fault of the file system; the old content is there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")  # two processes may write the same cache file
    try:
        write_synced(beside, content)
        beside.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise StorageError(
            f"{path}: can't be written: {reason_of(error)}{space_note(path.parent, len(content))}"
        ) from None


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file to the disk itself, never through a link; raises OSError."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as handle:
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


def reason_of(error: OSError) -> str:
    """What the system says, for a message."""
    return (error.strerror or str(error)).lower()


def space_note(directory: Path, needed: int) -> str:
    """What a write takes and what there is, for a message."""
    try:
        system = os.statvfs(directory)
    except OSError:
        return f"; {needed:,} bytes are needed"
    return f"; {needed:,} bytes are needed, {system.f_bavail * system.f_frsize:,} are free"


def dump_json(value: Any) -> bytes:
    """JSON as our files have it."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def hash_of(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sealed(value: dict[str, Any]) -> bytes:
    """A JSON object with the SHA-256 of its own text."""
    return dump_json({**value, "sha256": hash_of(dump_json(value))})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` made.

    Raises:
        ArtefactError: missing, or a single byte is not as it was.
    """
    data = read_bytes(path, LARGEST_JSON_BYTES)
    value = parse_json(path, data)
    value.pop("sha256", None)
    try:
        right = data == sealed(value)
    except (ValueError, RecursionError):  # half a surrogate pair, or nested too deep
        right = False
    if not right:
        raise ArtefactError(f"{path}: damaged: not the bytes that were saved")
    return value


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, no link.

    Raises:
        ArtefactError: something else, or it can't be read.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtefactError(f"{path}: not a regular file")
        with open(path, "rb") as handle:
            yield handle
    except OSError as error:
        raise ArtefactError(f"{path}: {reason_of(error)}") from None


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ArtefactError: it has more than `most`.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > most:
            raise ArtefactError(f"{path}: {size:,} bytes are more than there should be ({most:,})")
        return handle.read(size)


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file's bytes; raises ArtefactError."""
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
    return parse_json(path, read_bytes(path, LARGEST_JSON_BYTES))


def read_text(path: Path) -> str:
    """A text file out of a run directory; raises ArtefactError as `read_json`."""
    try:
        return read_bytes(path, LARGEST_TEXT_BYTES).decode()
    except UnicodeDecodeError:
        raise ArtefactError(f"{path}: damaged: not UTF-8") from None
