"""Chooses device and precision, and sets what PyTorch keeps for a process: random state and freed memory."""

import ctypes
import os
import statistics
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h of glibc: mallopt(3)


def choose_device(name: str) -> torch.device:
    """Return the device with this name; for `auto`, CUDA if PyTorch finds a CUDA device, else the CPU.

    If torchrun starts several processes on one machine, each gets a CUDA device of its own.

    Raises:
        ConfigError: there is no CUDA device, or there are fewer than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no CUDA device here; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # otherwise cuBLAS and cuDNN may sum in another order each time, and a resumed run would differ
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling costs time, and no code of lmtrain reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"device cuda: this machine has {count}, fewer than processes; start torchrun --nproc-per-node {count}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_precision(name: str, device: torch.device, size: int) -> tuple[str, str]:
    """Return `fp32` or `bf16`, and the reason: the configured one, or for `auto` the faster one on this device.

    Args:
        size: the hidden size H. The product that is timed computes the gates of an LSTM for 512 tokens,
            (512, H) @ (H, 4H).
    """
    if name != "auto":
        return name, "as configured"
    shapes = (512, size), (size, 4 * size)
    operands = [
        [torch.ones(shape, device=device, dtype=dtype) for shape in shapes] for dtype in (torch.float32, torch.bfloat16)
    ]
    pairs: list[tuple[float, ...]] = []
    start_s = time.monotonic()
    while len(pairs) < 5 or (len(pairs) < 50 and time.monotonic() - start_s < 0.1):
        pairs.append(tuple(_product_seconds(device, *each) for each in operands))
    pairs = pairs[1:]  # the first product of each precision includes preparation
    # the two are timed in turn, and medians compared, since a busy machine slows both; bf16 must win clearly, since
    # its casts cost time too
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
    """Let the C library keep the memory that tensors free, for the tensors of the next step. Otherwise
    each step returns tens of megabytes, which the system zeroes before it lends them again. Only glibc can do so."""
    with suppress(OSError, AttributeError, TypeError):  # TypeError: on Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which PyTorch computes matrix products in this precision."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of PyTorch's random generators as uint8 tensors (bytes,), by the names `cpu` and `cuda`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the state of PyTorch's random generators to one that `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_of(seed: int, step: int, rank: int) -> int:
    """Return a 64-bit seed for one process at one step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
