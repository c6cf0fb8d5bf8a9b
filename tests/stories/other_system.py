"""Runs lmtrain in a process that lacks what other systems lack: `python other_system.py '[["train", ...], ...]'`.
With a second argument, Ctrl-C comes after the first save.

`test_other_systems.py` starts it. The libraries that lmtrain uses are imported first, since they ask the system which
it is, and have other ways of their own on each. `filelock` is not: without fcntl it takes its soft locks.
"""

import builtins
import ctypes
import io
import json
import os
import signal
import sys
from typing import Any

import tensorboard.compat.proto.event_pb2  # noqa: F401
import tokenizers  # noqa: F401
import torch.utils.tensorboard.summary  # noqa: F401
import tqdm  # noqa: F401

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios")
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2")
OF_OS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "fdatasync", "fork", "geteuid", "getuid", "mkfifo", "pread",
    "sched_getaffinity", "statvfs", "uname",
)  # fmt: skip


def hide() -> None:
    for module in MODULES:
        sys.modules[module] = None  # type: ignore[assignment]  # so that an import of it raises ImportError
    for owner, names in ((signal, SIGNALS), (os, OF_OS)):
        for name in names:
            delattr(owner, name)
    real_open, real_os_open, real_cdll = builtins.open, os.open, ctypes.CDLL

    def refuse(path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            text = os.fsdecode(path)
            if text.startswith(("/proc", "/sys/", "/dev/")) and not text.startswith(("/dev/shm/", os.devnull)):
                raise FileNotFoundError(2, "hidden", text)

    def hiding_open(path: Any, *arguments: Any, **more: Any) -> Any:
        refuse(path)
        return real_open(path, *arguments, **more)

    def hiding_os_open(path: Any, *arguments: Any, **more: Any) -> int:
        refuse(path)
        return real_os_open(path, *arguments, **more)

    def cdll(name: Any, *arguments: Any, **more: Any) -> Any:
        if name is None:  # as on Windows
            raise TypeError("argument of type 'NoneType' is not iterable")
        return real_cdll(name, *arguments, **more)

    builtins.open = io.open = hiding_open  # type: ignore[assignment]
    os.open, ctypes.CDLL = hiding_os_open, cdll  # type: ignore[assignment,misc]


def interrupt_after_first_save() -> None:
    replace = os.replace

    def replace_then_interrupt(source: Any, target: Any) -> None:
        replace(source, target)
        if os.path.basename(target) == "last.json":
            os.replace = replace
            signal.raise_signal(signal.SIGINT)

    os.replace = replace_then_interrupt


def main(commands: list[list[str]]) -> int:
    from lmtrain.cli import _run

    for command in commands:
        sys.argv = ["lmtrain", *command]
        if code := _run():
            return code
    return 0


if __name__ == "__main__":
    hide()
    if sys.argv[2:]:
        interrupt_after_first_save()
    sys.exit(main(json.loads(sys.argv[1])))
