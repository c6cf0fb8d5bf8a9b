"""A token store under construction. One process builds it; if that process is killed, the next one continues.

`.building-KEY` holds the arrays so far and, from the first save on, `progress.json`. That file says how many bytes of
each array are safe on the disk, with their checksums, the sums so far, and the place in the text where reading
continues. Bytes of an array after the safe ones are cut off. The builder holds the lock `.building-KEY.lock`.
"""

import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lmtrain.data.store.encoding import BlockResult
from lmtrain.data.text.reading import RawBlock
from lmtrain.errors import ArtefactError, DataError
from lmtrain.system.console import Notify
from lmtrain.system.files import read_sealed, sealed, sync_directory, sync_file, write_atomically
from lmtrain.system.locks import hold_lock

ARRAYS = ("tokens", "offsets", "hashes")
SUMS = ("sequences", "tokens", "unknown_tokens", "characters", "bytes", "blank", "longest")
SAVE_BYTES, SAVE_S = 64 << 20, 10.0  # text, and time, between two saves
KEPT_S = 7 * 24 * 3600.0  # how long an unfinished build is kept
PROGRESS = "progress.json"
BUILD_FORMAT = 1


class Place(NamedTuple):
    """Where in the text reading continues."""

    file: int = 0
    offset: int = 0
    line: int = 1


class Build:
    """The arrays of a store, written from the first block to the last.

    Args:
        directory: an empty directory, or one with what an earlier build of the same store has left.
        stack: closes the files.

    Raises:
        OSError: here or later, if the arrays can't be written.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        for path in directory.iterdir():
            if path.name not in (PROGRESS, *(f"{name}.bin" for name in ARRAYS)):
                path.unlink()
        self.place, self.totals = Place(), dict.fromkeys(SUMS, 0)
        self.sizes, self.checksums = dict.fromkeys(ARRAYS, 0), dict.fromkeys(ARRAYS, 0)
        self.continued = self._load_progress()
        self._files: dict[str, IO[bytes]] = {}
        for name in ARRAYS:
            self._files[name] = stack.enter_context(self._path(name).open("ab"))
            self._files[name].truncate(self.sizes[name])
        if not self.continued:
            self._append("offsets", np.zeros(1, "<u8").tobytes())
        self._saved_s, self._unsaved_bytes = time.monotonic(), 0

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _load_progress(self) -> bool:
        """Take over what an earlier build has saved; False if it has saved nothing, or its arrays are damaged."""
        with suppress(ArtefactError, OSError, ValueError, KeyError, TypeError):
            saved = read_sealed(self.directory / PROGRESS)
            found = {name: _checksum(self._path(name), saved["sizes"][name]) for name in ARRAYS}
            if saved["format"] != BUILD_FORMAT or found != saved["checksums"]:
                return False
            self.place, self.totals = Place(*saved["place"]), dict(saved["totals"])
            self.sizes, self.checksums = dict(saved["sizes"]), dict(saved["checksums"])
            return True
        return False

    def _append(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self.sizes[name] += len(data)
        self.checksums[name] = zlib.crc32(data, self.checksums[name])  # computed from `data`, not read back

    def add(self, raw: RawBlock, result: BlockResult) -> None:
        """Append the next block, which has been encoded."""
        self._append("tokens", result.tokens)
        self._append("offsets", (np.frombuffer(result.ends, "<u8") + np.uint64(self.totals["tokens"])).tobytes())
        self._append("hashes", result.hashes)
        for name, value in result.figures.items():
            self.totals[name] = max(self.totals[name], value) if name == "longest" else self.totals[name] + value
        self.place = Place(raw.file, raw.end, raw.next_line)
        self._unsaved_bytes += len(raw.data)
        if self._unsaved_bytes >= SAVE_BYTES or time.monotonic() - self._saved_s >= SAVE_S:
            self._save()

    def _save(self) -> None:
        self._sync()
        progress = {"format": BUILD_FORMAT, "place": self.place, "totals": self.totals}
        progress |= {"sizes": self.sizes, "checksums": self.checksums}
        write_atomically(self.directory / PROGRESS, sealed(progress))
        self._saved_s, self._unsaved_bytes = time.monotonic(), 0

    def _sync(self) -> None:
        for handle in self._files.values():
            sync_file(handle)

    def finish(self, counts: dict[str, Any]) -> None:
        """Complete the store: write its counts beside the arrays."""
        self._sync()
        (self.directory / PROGRESS).unlink(missing_ok=True)
        (self.directory / "store.json").write_bytes(sealed(counts))
        sync_directory(self.directory)


def _checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file; raises ValueError if it has fewer."""
    checksum = 0
    with open(path, "rb") as handle:
        for start in range(0, size, 1 << 20):
            checksum = zlib.crc32(handle.read(min(1 << 20, size - start)), checksum)
        if handle.tell() != size:
            raise ValueError(f"{path}: shorter than it was")
    return checksum


@contextmanager
def locked(cache: Path, key: str, notify: Notify) -> Iterator[Path]:
    """Hold the lock on building `key`; a second process says that it waits, and waits.

    Yields the directory to build in, which need not exist. What is left of it afterwards is kept only if another
    build can continue from it.

    Raises:
        OSError: the lock can't be made.
    """
    lock = cache / f".building-{key}.lock"
    directory = lock.with_suffix("")
    with hold_lock(lock, lambda holder: notify(f"waiting for another process that prepares the same data ({lock})")):
        try:
            yield directory
        except DataError:  # the text has a fault, so no store can be made of it
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            if not (directory / PROGRESS).exists():
                shutil.rmtree(directory, ignore_errors=True)
                with suppress(PermissionError):  # Windows removes it when it is released
                    lock.unlink(missing_ok=True)


def remove_abandoned(cache: Path, but: str) -> None:
    """Remove unfinished builds of other keys that no process holds and that are damaged or older than `KEPT_S`."""
    for lock in cache.glob(".building-*.lock"):
        if lock.name == f".building-{but}.lock":
            continue
        with suppress(OSError), hold_lock(lock, _give_up, write_id=False):  # the disk may be full
            directory = lock.with_suffix("")
            with suppress(ArtefactError):
                read_sealed(directory / PROGRESS)
                if time.time() - (directory / PROGRESS).stat().st_mtime < KEPT_S:
                    continue
            shutil.rmtree(directory, ignore_errors=True)
            lock.unlink()


def _give_up(holder: str) -> None:
    raise BlockingIOError(f"process {holder} builds it")
