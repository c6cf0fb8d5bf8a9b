"""Locks on files. One process at a time holds a lock, until it releases the lock or ends, however it ends.

The `filelock` library keeps them. From version 4 on it does not change a file that another process has locked,
opens no symbolic link, and tries again if the file that it has locked was removed meanwhile.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def hold_lock(path: Path, on_held: Callable[[str], None], *, write_id: bool = True) -> Iterator[None]:
    """Hold a lock.

    Args:
        on_held: called once if another process holds the lock, with the id of that process, or "unknown". If it
            returns, this process waits for the lock.
        write_id: write this process's id into the file, for the `on_held` of others.

    Raises:
        OSError: the lock file can't be made, or is a symbolic link.
    """
    from filelock import FileLock, Timeout  # only where a lock is held: it takes 25 ms and registers a fork hook

    lock = FileLock(path, on_acquired=_write_process_id if write_id else None)
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
