"""What the machine is and how it is set: device, precision, threads, random state."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lmtrain.errors import ConfigError, OutOfMemoryError


def choose_device(name: str) -> torch.device:
    """`cuda:0` where there is one and `cpu` otherwise for `auto`; else the device named.

    Raises:
        ConfigError: cuda without one.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # without this, cuBLAS and cuDNN may sum in another order each time, and a resumed run would differ
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda:0")


def choose_precision(name: str, device: torch.device, size: int) -> tuple[str, str]:
    """(`fp32` or `bf16`, why): what the config says, or for `auto` what is faster for products of this size here.

    Args:
        size: of the square weight to try, rows as many as in a batch.
    """
    if name != "auto":
        return name, "as configured"
    seconds = {"fp32": _product_seconds(device, size, torch.float32)}
    seconds["bf16"] = _product_seconds(device, size, torch.bfloat16)
    # casts cost, too: bf16 has to win clearly
    chosen = "bf16" if seconds["bf16"] < 0.7 * seconds["fp32"] else "fp32"
    figures = ", ".join(f"{dtype} {1e3 * best:.2f} ms" for dtype, best in seconds.items())
    return chosen, f"a product of 512 x {size} x {size} takes {figures}"


def _product_seconds(device: torch.device, size: int, dtype: torch.dtype) -> float:
    left, right = (
        torch.ones(512, size, device=device, dtype=dtype),
        torch.ones(size, size, device=device, dtype=dtype),
    )
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return best


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which matrix products run in the given precision."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of PyTorch's random generators, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's result depends on beside its config: versions, device, threads, command, git commit."""
    return {
        "lmtrain": version("lmtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "command": shlex.join(sys.argv),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the working directory, where it is a git checkout; the run goes on without."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def out_of_memory(error: BaseException, mend: str) -> OutOfMemoryError | None:
    """The error to raise in place of one that says memory ran out, in PyTorch's several ways; else None."""
    signs = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)):
        return OutOfMemoryError(f"out of memory: {mend}")
    return None


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """While this lasts, a signal to end is noted, for the loop to act on after its step; a second one is no worse."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        before = {
            number: signal.signal(number, note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup stays nohup
        }
    except ValueError:  # not the main thread: signals are somebody else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
