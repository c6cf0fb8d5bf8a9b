"""Computes digests of files, each once; those of large files are remembered from one process to the next.

A remembered digest belongs to a file's identity: its path, device, inode, size, and the times when its content and its
inode changed; nobody can set the last of these. Two writes within one tick of the clock look alike, so a digest is
remembered only if the file had been unchanged for longer than any file system's tick, as in git's index
(https://git-scm.com/docs/racy-git).
"""

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO

from lmtrain.data.text.reading import open_text
from lmtrain.errors import ArtefactError, StorageError
from lmtrain.system.files import read_sealed, sealed, write_atomically
from lmtrain.system.processes import core_count

LARGE_BYTES = 64 << 20
AT_REST_NS = 2 * 10**9
CHUNK_BYTES = 1 << 20
MOST_THREADS = 8

Watch = Callable[[str, int, int], None]  # shows progress: the task, bytes done, bytes in all


def unwatched(what: str, done_bytes: int, total_bytes: int) -> None:
    """Show no progress."""


class Digests:
    """The digests of files, for one command.

    Args:
        directory: where the digests of large files are remembered; None remembers none.
        watch: shows progress on large files.
    """

    def __init__(self, directory: Path | None, watch: Watch = unwatched) -> None:
        self.directory, self.watch = directory, watch
        self._known: dict[str, tuple[list[int], str]] = {}
        self._lock, self._done_bytes, self._total_bytes = Lock(), 0, 0

    def sha256_of(self, paths: Sequence[str]) -> list[str]:
        """Return the SHA-256 of each file, computed on all cores; raises DataError if one can't be read."""
        with ThreadPoolExecutor(min(MOST_THREADS, core_count())) as pool:  # hashing releases Python's lock
            return list(pool.map(self.sha256, paths))

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file; raises DataError if it can't be read."""
        if path not in self._known:
            with open_text(path) as handle:
                self._known[path] = self._digest(handle, "sha256")
        return self._known[path][1]

    def has_changed(self, path: str) -> bool:
        """Return whether a file has changed since `sha256` read it. If its identity is new, its bytes decide."""
        identity, digest = self._known[path]
        with open_text(path) as handle:
            return _identity(handle) != identity and self._compute(handle, "sha256") != digest

    def crc32(self, path: Path) -> int:
        """Return the CRC-32 of a token store's file, or raise OSError."""
        with open(path, "rb") as handle:  # not mapped, since mapped pages would count as memory of this process
            return int(self._digest(handle, "crc32")[1])

    def _digest(self, handle: IO[bytes], kind: str) -> tuple[list[int], str]:
        identity, now_ns = _identity(handle), time.time_ns()
        if self.directory is None or os.fstat(handle.fileno()).st_size < LARGE_BYTES:
            return identity, self._compute(handle, kind)
        path = os.fsencode(os.path.abspath(handle.name))
        note = self.directory / f"{hashlib.sha256(path).hexdigest()[:32]}-{kind}.json"
        with suppress(ArtefactError, KeyError):  # without a sound note the digest is computed
            remembered = read_sealed(note)
            if remembered["identity"] == identity:
                return identity, str(remembered["digest"])
        digest = self._compute(handle, kind)
        if max(identity[-2:]) < now_ns - AT_REST_NS and _identity(handle) == identity:
            with suppress(OSError, StorageError):  # without a note the digest is computed again next time
                self.directory.mkdir(parents=True, exist_ok=True)
                write_atomically(note, sealed({"identity": identity, "digest": digest}))
        return identity, digest

    def _compute(self, handle: IO[bytes], kind: str) -> str:
        size, checksum, sha256 = os.fstat(handle.fileno()).st_size, 0, hashlib.sha256()
        if size >= LARGE_BYTES:
            self._advance(0, size)
        while chunk := handle.read(CHUNK_BYTES):
            if kind == "crc32":
                checksum = zlib.crc32(chunk, checksum)
            else:
                sha256.update(chunk)
            if size >= LARGE_BYTES:
                self._advance(len(chunk), 0)
        return str(checksum) if kind == "crc32" else sha256.hexdigest()

    def _advance(self, done_bytes: int, more_bytes: int) -> None:
        with self._lock:
            self._done_bytes, self._total_bytes = self._done_bytes + done_bytes, self._total_bytes + more_bytes
            self.watch("checking that files are as they were", self._done_bytes, self._total_bytes)


def _identity(handle: IO[bytes]) -> list[int]:
    status = os.fstat(handle.fileno())
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
