"""What the machine is and how it is set: device, precision, threads, random state."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h: mallopt(3)


def choose_device(name: str) -> torch.device:
    """CUDA where there is any and `cpu` otherwise for `auto`; else the device named. Of several processes that torchrun
    starts on a machine, each has a CUDA device of its own.

    Raises:
        ConfigError: cuda without one, or fewer devices than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # without this, cuBLAS and cuDNN may sum in another order each time, and a resumed run would differ
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ConfigError(f"device cuda: {count} here, too few for the processes; torchrun --nproc-per-node {count}")
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def choose_precision(name: str, device: torch.device, size: int) -> tuple[str, str]:
    """(`fp32` or `bf16`, why): what the config says, or for `auto` what is faster for products of this size here.

    Args:
        size: H; what is tried are the gates of 512 tokens in an LSTM, (512, H) @ (H, 4H).
    """
    if name != "auto":
        return name, "as configured"
    operands = {
        dtype: (
            torch.ones(512, size, device=device, dtype=dtype),
            torch.ones(size, 4 * size, device=device, dtype=dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    pairs: list[tuple[float, ...]] = []
    start_s = time.monotonic()
    while len(pairs) < 5 or (len(pairs) < 50 and time.monotonic() - start_s < 0.1):
        pairs.append(tuple(_product_seconds(device, *each) for each in operands.values()))
    pairs = pairs[1:]  # the first product of a kind is prepared first
    # in turns, and the median: a busy machine slows both. Casts cost, too, so bf16 has to win clearly
    chosen = "bf16" if statistics.median(bf16 / fp32 for fp32, bf16 in pairs) < 0.7 else "fp32"
    fp32_ms, bf16_ms = (1e3 * statistics.median(each) for each in zip(*pairs, strict=True))
    return chosen, f"a product of 512 x {size} x {4 * size} takes fp32 {fp32_ms:.2f} ms, bf16 {bf16_ms:.2f} ms"


def _product_seconds(device: torch.device, left: Tensor, right: Tensor) -> float:
    start_s = time.perf_counter()
    product = left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken_s = time.perf_counter() - start_s
    del product
    return taken_s


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors free, for the next step's: otherwise a step of tens of
    megabytes goes back to the system and comes again, zeroed page by page (with glibc; elsewhere nothing changes)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_MMAP_MAX, 0)


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


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for a process that has no random state of its own at a step, 64 bits."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
