"""The environment on which a run's result depends beside its configuration; kept in `environment.json`."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from lmtrain.system.version import __version__


def environment(device: torch.device, processes: int = 1, launch: str | None = None) -> dict[str, Any]:
    """Describe this process: versions, device, number of threads, command and git commit.

    `launch` is torchrun's name for the `processes` that train together; None if torchrun did not start them.
    """
    return {
        "lmtrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "processes": processes,
        "launch": launch,
        "command": shlex.join(sys.argv),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the git commit of the working directory; None if that is not a git checkout, or git is missing or slow."""
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() or None
    return None
