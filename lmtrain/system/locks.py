"""Locks on files. One process at a time holds a lock, until it releases the lock or ends, however it ends.

The `filelock` library keeps them. From version 4 on it does not change a file that another process has locked,
opens no symbolic link, and tries again if the file that it has locked was removed meanwhile.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def hold_lock(path: Path, on_held: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, with this process's id in its file.

    Args:
        on_held: called once if another process holds the lock, with the id of that process, or "unknown". If it
            returns, this process waits for the lock.

    Raises:
        OSError: the lock file can't be made, or is a symbolic link.
    """
    lock = FileLock(path, on_acquired=_write_process_id)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_held(_read_process_id(path))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_process_id(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _read_process_id(path: Path) -> str:
    with suppress(OSError, ValueError), open(path, "rb") as handle:
        return str(int(handle.read(20)))
    return "unknown"
