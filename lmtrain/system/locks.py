"""Locks on files. One process at a time holds a lock, until it releases the lock or ends, however it ends.

The `filelock` library keeps them. From version 4 on it does not change a file that another process has locked,
opens no symbolic link, and tries again if the file that it has locked was removed meanwhile.

Some network file systems have no locks (Lustre without `-o flock`, NFS without its lock daemon). There, a second file
takes the place of the lock: it exists while a process holds the lock, and says which process of which machine. If that
process has ended, the next process of the same machine takes the file over. Whether a process of another machine has
ended, only the user can know.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lmtrain.system.console import Notify
from lmtrain.system.files import reason_of

if TYPE_CHECKING:
    from filelock import BaseFileLock

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP}  # not those of a held lock
MARKER = ".held"  # the name of the file that takes a lock's place is the lock's name and this
TAKEOVER_S = 3.0  # filelock looks at an unfinished file for two seconds before it takes it for that of an ended process


@contextmanager
def hold_lock(
    path: Path, on_held: Callable[[str], None], notify: Notify = lambda line: None, *, write_id: bool = True
) -> Iterator[None]:
    """Hold a lock.

    Args:
        on_held: called once if another process holds the lock, with the id of that process, or "unknown". If it
            returns, this process waits for the lock.
        notify: shows a note if the file system has no locks.
        write_id: write this process's id into the file, for the `on_held` of others.

    Raises:
        OSError: the lock file can't be made, or is a symbolic link.
    """
    # imported only where a lock is held: it takes 25 ms and registers a fork hook
    from filelock import SoftFileLock, UnixFileLock, WindowsFileLock

    system_lock = WindowsFileLock if sys.platform == "win32" else UnixFileLock
    lock: BaseFileLock = system_lock(path, fallback_to_soft=False, on_acquired=_write_id if write_id else None)
    try:
        _acquire(lock, 0, lambda: on_held(_read_id(path)))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        marker = path.with_name(path.name + MARKER)
        notify(f"note: {path}: no locks on this file system ({reason_of(error)}); {marker.name} is used instead")
        lock = SoftFileLock(marker)
        _acquire(lock, TAKEOVER_S, lambda: on_held(_read_marker(marker)))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: "BaseFileLock", patience_s: float, on_held: Callable[[], None]) -> None:
    from filelock import Timeout

    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        on_held()
        lock.acquire()


def _write_id(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f" {os.getpid()}".encode())  # Windows lets nobody read a lock's first byte


def _read_id(path: Path) -> str:
    with suppress(OSError, ValueError), open(path, "rb", buffering=0) as handle:
        handle.seek(1)
        return str(int(handle.read(20)))
    return "unknown"


def _read_marker(marker: Path) -> str:
    """Return the holder that filelock has written into its file: its id, and its machine if that is another one."""
    holder = "unknown"
    with suppress(OSError, ValueError):
        number, machine, *_ = marker.read_text(encoding="utf-8").splitlines()
        holder = f"{int(number)} of {machine.partition('?')[0]}"  # after the ?: which container of the machine
    return f"{holder} (if that has ended, remove {marker})"
