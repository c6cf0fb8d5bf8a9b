"""A token store under construction: one process builds it, and what one was killed over, the next one goes on with.

`.building-KEY` holds the arrays so far and, from the first save on, `progress.json`: how many bytes of each array are
on the disk itself, their checksums, the sums so far, and the place in the text from which on to read. What stands
behind that in the arrays is cut off. `.building-KEY.lock` is held as long as somebody builds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lmtrain.data.store.encoding import BlockResult
from lmtrain.data.text.reading import RawBlock
from lmtrain.errors import ArtefactError, DataError
from lmtrain.system.files import read_sealed, sealed, sync_directory, write_atomically

ARRAYS = ("tokens", "offsets", "hashes")
SUMS = ("sequences", "tokens", "unknown_tokens", "characters", "bytes", "blank", "longest")
SAVE_BYTES, SAVE_S = 64 << 20, 10.0  # of text, or of time, between two saves
KEPT_S = 7 * 24 * 3600.0  # a build that nobody goes on with
PROGRESS = "progress.json"
BUILD_FORMAT = 1

Notify = Callable[[str], None]


class Place(NamedTuple):
    """Where to read on."""

    file: int = 0
    offset: int = 0
    line: int = 1


class Build:
    """The arrays of a store, written from the first block to the last.

    Args:
        directory: empty, or what an earlier build of the same store has left.

    Raises:
        OSError: here or later, it can't be written.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        for path in directory.iterdir():
            if path.name not in (PROGRESS, *(f"{name}.bin" for name in ARRAYS)):
                path.unlink()
        self.place, self.totals = Place(), dict.fromkeys(SUMS, 0)
        self.sizes, self.checksums = dict.fromkeys(ARRAYS, 0), dict.fromkeys(ARRAYS, 0)
        self.continued = self._take_over()
        self._files: dict[str, IO[bytes]] = {}
        for name in ARRAYS:
            self._files[name] = stack.enter_context(self._path(name).open("ab"))
            self._files[name].truncate(self.sizes[name])
        if not self.continued:
            self._put("offsets", np.zeros(1, "<u8").tobytes())
        self._saved_s, self._unsaved_bytes = time.monotonic(), 0

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _take_over(self) -> bool:
        """Whether there is a build to go on with; its arrays are what was written."""
        with suppress(ArtefactError, OSError, ValueError, KeyError, TypeError):
            saved = read_sealed(self.directory / PROGRESS)
            if saved["format"] != BUILD_FORMAT:
                return False
            for name in ARRAYS:
                if _checksum(self._path(name), saved["sizes"][name]) != saved["checksums"][name]:
                    return False
            self.place, self.totals = Place(*saved["place"]), dict(saved["totals"])
            self.sizes, self.checksums = dict(saved["sizes"]), dict(saved["checksums"])
            return True
        return False

    def _put(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self.sizes[name] += len(data)
        self.checksums[name] = zlib.crc32(data, self.checksums[name])  # of what should be there, not of what is

    def add(self, raw: RawBlock, answer: BlockResult) -> None:
        """The next block, and what `Encoding` made of it."""
        tokens, ends, hashes = answer.parts
        self._put("tokens", tokens)
        self._put("offsets", (np.frombuffer(ends, "<u8") + np.uint64(self.totals["tokens"])).tobytes())
        self._put("hashes", hashes)
        longest = max(self.totals["longest"], answer.figures.get("longest", 0))
        for name, value in answer.figures.items():
            self.totals[name] += value
        self.totals["longest"] = longest
        self.place = Place(raw.file, raw.end, raw.next_line)
        self._unsaved_bytes += len(raw.data)
        if self._unsaved_bytes >= SAVE_BYTES or time.monotonic() - self._saved_s >= SAVE_S:
            self._save()

    def _save(self) -> None:
        self.sync()
        progress = {"format": BUILD_FORMAT, "place": self.place, "totals": self.totals}
        progress |= {"sizes": self.sizes, "checksums": self.checksums}
        write_atomically(self.directory / PROGRESS, sealed(progress))
        self._saved_s, self._unsaved_bytes = time.monotonic(), 0

    def sync(self) -> None:
        """Have all that was added on the disk itself."""
        for handle in self._files.values():
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self, counts: dict[str, Any]) -> None:
        """The arrays are whole: seal them with their counts."""
        self.sync()
        (self.directory / PROGRESS).unlink(missing_ok=True)
        (self.directory / "store.json").write_bytes(sealed(counts))
        sync_directory(self.directory)


def _checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file; raises ValueError where it has fewer."""
    checksum = 0
    with open(path, "rb") as handle:
        for start in range(0, size, 1 << 20):
            part = handle.read(min(1 << 20, size - start))
            checksum = zlib.crc32(part, checksum)
        if handle.tell() != size:
            raise ValueError(f"{path}: shorter than it was")
    return checksum


@contextmanager
def locked(cache: Path, key: str, notify: Notify) -> Iterator[Path]:
    """The one who builds `key`; who comes second waits, and says so.

    Gives the directory to build in, which need not be there. What is left of it stays only where it can be continued.

    Raises:
        OSError: the lock can't be made.
    """
    lock = cache / f".building-{key}.lock"
    directory = lock.with_suffix("")
    with _held(lock, lambda: notify(f"waiting for another process that prepares the same ({lock})")):
        try:
            yield directory
        except DataError:  # of this text there will be no store
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            if not (directory / PROGRESS).exists():
                shutil.rmtree(directory, ignore_errors=True)
                lock.unlink(missing_ok=True)


@contextmanager
def _held(lock: Path, on_waiting: Callable[[], None]) -> Iterator[None]:
    while True:
        with open(lock, "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            if lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat()):  # not removed meanwhile
                yield
                return


def remove_abandoned(cache: Path, but: str) -> None:
    """Remove what killed builders left, where nobody could or would go on with it: directories nobody has locked."""
    for lock in cache.glob(".building-*.lock"):
        if lock.name == f".building-{but}.lock":
            continue
        with suppress(OSError), open(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            directory = lock.with_suffix("")
            with suppress(ArtefactError):
                read_sealed(directory / PROGRESS)
                if time.time() - (directory / PROGRESS).stat().st_mtime < KEPT_S:
                    continue
            shutil.rmtree(directory, ignore_errors=True)
            lock.unlink()
