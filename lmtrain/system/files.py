"""Reads and writes single files: a write is whole or does nothing, a read has a size limit and follows no link."""

import atexit
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lmtrain.errors import ArtefactError, StorageError

LARGEST_JSON_BYTES = 16 << 20
LARGEST_TEXT_BYTES = 256 << 20
RETRIED_AFTER_S = (0.01, 0.1, 1.0)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds either the whole old content or the whole new one.

    If the disk is full, or the file system has another fault, it raises StorageError and the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")  # two processes may write the same cache file
    try:
        write_synced(temporary, content)
        move(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"{path}: can't be written: {reason_of(error)}{space_note(path.parent, len(content))}"
        ) from None


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file to the disk itself, in place of an old one or of a link; raises OSError."""
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file piece by piece, as `write_synced`; returns its size in bytes and its SHA-256; raises OSError."""
    digest, size = hashlib.sha256(), 0
    path.unlink(missing_ok=True)
    with open(path, "xb") as handle:
        for piece in pieces:
            digest.update(piece)
            size += handle.write(piece)
        sync_file(handle)
    return size, digest.hexdigest()


def sync_file(handle: IO[Any]) -> None:
    """Write an open file to the disk itself, so that its content survives a power cut; raises OSError."""
    handle.flush()
    if sys.platform == "darwin":  # whose fsync leaves the content in the drive's own memory
        import fcntl

        with suppress(OSError):  # a network file system has only fsync
            fcntl.fcntl(handle.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Write a directory to the disk itself, so that renames in it survive a power cut; raises OSError.

    Windows and some network file systems do so by themselves, and have no such call.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a file, in place of an old one of that name, or a directory to a name that is free; raises OSError.

    Windows refuses to rename what another program has open, and a virus scanner opens each new file for a moment.
    There this function tries again for a second.
    """
    for wait_s in RETRIED_AFTER_S if sys.platform == "win32" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait_s)
    os.replace(source, target)


@contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a new directory, and remove it at the end; without `parent` the system chooses where.

    Windows removes no file that is mapped into memory. What it keeps is removed when the process ends.
    """
    path = Path(tempfile.mkdtemp(prefix="lmtrain-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            atexit.register(shutil.rmtree, path, ignore_errors=True)


def reason_of(error: OSError) -> str:
    """Return the system's reason for an error, for use in a message."""
    return (error.strerror or str(error)).lower()


def space_note(directory: Path, needed: int) -> str:
    """Return how many bytes a write needs and how many are free, for use in a message."""
    try:
        return f"; {needed:,} bytes are needed, {shutil.disk_usage(directory).free:,} are free"
    except OSError:
        return f"; {needed:,} bytes are needed"


def dump_json(value: Any) -> bytes:
    """Return the bytes of a JSON file, indented by one space and with a final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def hash_of(data: bytes) -> str:
    """Return the SHA-256 of these bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sealed(value: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON object to which the SHA-256 of its own text is added as `sha256`."""
    return dump_json({**value, "sha256": hash_of(dump_json(value))})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object that `sealed` made; raises ArtefactError if a byte of it was changed."""
    data = read_bytes(path, LARGEST_JSON_BYTES)
    value = parse_json(path, data)
    value.pop("sha256", None)
    try:
        intact = data == sealed(value)
    except (ValueError, RecursionError):  # half a surrogate pair, or nested too deep
        intact = False
    if not intact:
        raise ArtefactError(f"{path}: damaged: not the bytes that were saved")
    return value


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading; raises ArtefactError for a link, another kind of file, or a fault in reading."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtefactError(f"{path}: not a regular file")
        with open(path, "rb") as handle:
            yield handle
    except OSError as error:
        raise ArtefactError(f"{path}: {reason_of(error)}") from None


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a regular file; raises ArtefactError if it can't be read, or has more than `largest` bytes."""
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > largest:
            raise ArtefactError(f"{path}: {size:,} bytes; such a file has at most {largest:,}")
        return handle.read(size)


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file; raises ArtefactError if there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ArtefactError(f"{path}: damaged: not JSON") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: damaged: not a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 16 MiB; raises ArtefactError if there is none."""
    return parse_json(path, read_bytes(path, LARGEST_JSON_BYTES))


def read_text(path: Path) -> str:
    """Read a regular UTF-8 file of at most 256 MiB; raises ArtefactError if there is none."""
    try:
        return read_bytes(path, LARGEST_TEXT_BYTES).decode()
    except UnicodeDecodeError:
        raise ArtefactError(f"{path}: damaged: not UTF-8") from None
