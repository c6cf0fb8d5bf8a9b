"""The environment on which a run's result depends beside its configuration; kept in `environment.json`."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from lmtrain.config import Config
from lmtrain.errors import ArtefactError
from lmtrain.runs.directory import RunDirectory
from lmtrain.system.console import Notify
from lmtrain.system.device import Layer, choose_device
from lmtrain.system.files import read_json
from lmtrain.system.version import __version__


def device_of(config: Config, notify: Notify = lambda _: None, run: RunDirectory | None = None) -> torch.device:
    """Return the device on which to train as configured; see `choose_device`, whose errors it raises.

    Args:
        notify: is called with a line on why this device was chosen, or on what its results depend.
        run: the run that is resumed, if any. If it was begun on the CPU or on Apple's GPU, `auto` keeps to that: on the
            other the result would differ.
    """
    name, model = config.training.device, config.model
    if name == "auto" and run is not None and torch.backends.mps.is_available():
        with suppress(ArtefactError):
            begun_on = read_json(run.path / "environment.json").get("device")
            name = begun_on if begun_on in ("cpu", "mps") else name
    layer = Layer(model.cell, max(model.layer_sizes or [model.hidden_size]), config.batching.batch_size)
    return choose_device(name, layer, notify)


def environment(device: torch.device, processes: int = 1, launch: str | None = None) -> dict[str, Any]:
    """Describe this process: versions, device, number of threads, command and git commit.

    `launch` is torchrun's name for the `processes` that train together; None if torchrun did not start them.
    """
    return {
        "lmtrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
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
