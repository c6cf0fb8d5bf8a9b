"""Chooses device and precision, and sets what PyTorch keeps for a process: random state, determinism, threads."""

import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.model.cells import CELLS
from lmtrain.model.packing import pack_rows
from lmtrain.model.products import has_onednn
from lmtrain.system.console import Notify
from lmtrain.system.processes import launched_by_torchrun
from lmtrain.system.variables import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES

LEAST_TIMED_SIZE, QUEUED_PRODUCTS = 1024, 20  # on a GPU, which is asked for many products before it is waited for
HOPELESS_S = 0.25  # a bf16 product on a CPU that takes so long and 10 times as long as in fp32 is not tried again
TIMED_STEPS = 16  # tokens of each row of the layer that is timed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h of glibc: mallopt(3)


class Layer(NamedTuple):
    """The recurrent layer of a run that is timed to compare two devices."""

    cell: str  # a name in `CELLS`
    hidden_size: int
    rows: int  # rows of a batch


def choose_device(name: str, layer: Layer | None = None, notify: Notify = lambda _: None) -> torch.device:
    """Return the device with this name: `cpu`, `cuda`, `mps` (Apple's GPU) or another one that PyTorch has.

    For `auto` it is CUDA if PyTorch finds a CUDA device; else Apple's GPU, if a layer of this run is faster there than
    on the CPU; else the CPU. If torchrun starts several processes on one machine, each gets a CUDA device of its own.

    PyTorch refuses the few operations that it has not written for Apple's GPU, unless PYTORCH_ENABLE_MPS_FALLBACK=1 was
    in the environment before it was imported: then it computes them on the CPU, with a warning. The command line sets
    it; a program that uses lmtrain as a library sets it itself.

    Args:
        layer: the layer that is timed; without one, `auto` does not take Apple's GPU.
        notify: is called with a line on what was timed, or on what the results depend on.

    Raises:
        ConfigError: there is no such device, there are more processes than devices, or processes can't share its kind.
    """
    alone = not launched_by_torchrun()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and layer is not None and alone and torch.backends.mps.is_available():
            name = faster_device(torch.device("mps"), layer, notify).type
    if name == "cpu":
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.get_device_module(name).device_count()
    if count == 0:
        kind = {"cuda": "CUDA device", "mps": "Apple GPU"}.get(name, f"{name} device")
        raise ConfigError(f"device {name}: PyTorch finds no {kind} here; use cpu or auto")
    if name == "mps" and not alone:
        raise ConfigError("device mps: PyTorch can't connect processes on it; start without torchrun, or use cpu")
    if local_rank >= count:
        raise ConfigError(
            f"device {name}: this machine has {count}, fewer than processes; use torchrun --nproc-per-node {count}"
        )
    if name == "cuda" and os.environ.get(CUBLAS_WORKSPACE) not in DETERMINISTIC_WORKSPACES:
        notify(
            f"note: a resumed run may differ in its last digits; set {CUBLAS_WORKSPACE}={DETERMINISTIC_WORKSPACES[0]} "
            "before CUDA is used"
        )
    return torch.device(name, local_rank)


def faster_device(device: torch.device, layer: Layer, notify: Notify) -> torch.device:
    """Return the device, or the CPU if a training step of one recurrent layer takes less time there."""
    cpu = torch.device("cpu")
    here_s, there_s = (min(_seconds_of_passes(each, layer)) for each in (cpu, device))
    chosen = device if there_s < here_s else cpu
    notify(
        f"device {chosen.type}: a layer of {layer.hidden_size} over {layer.rows} rows takes {1e3 * there_s:.1f} ms on "
        f"{device.type}, {1e3 * here_s:.1f} ms on the CPU"
    )
    return chosen


@cache  # so that a process decides once
def _seconds_of_passes(device: torch.device, layer: Layer) -> list[float]:
    """Return the seconds of each of some forward and backward passes: two or more, for a tenth of a second."""
    cell, size = CELLS[layer.cell], layer.hidden_size
    rows = pack_rows(torch.full((layer.rows,), TIMED_STEPS)).to(device)
    gates = cell.gates * size
    inputs, states = (layer.rows * TIMED_STEPS, size), [(layer.rows, size) for _ in cell.states]
    shapes: list[tuple[int, ...]] = [inputs, *states, (gates, size), (gates, size), (gates,), (gates,)]
    operands = [torch.full(shape, 0.01, device=device, requires_grad=True) for shape in shapes]
    taken_s: list[float] = []
    while len(taken_s) < 3 or sum(taken_s[1:]) < 0.1:
        start_s = time.perf_counter()
        output, *_ = cell.kernel.apply(*operands, rows)
        output.sum().backward()
        synchronise(device)
        taken_s.append(time.perf_counter() - start_s)
    return taken_s[1:]  # the first pass includes preparation


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all work that was queued for it; the CPU queues none."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def make_deterministic(device: torch.device) -> None:
    """Have a GPU compute the same numbers each time; otherwise a resumed run would differ. The CPU does so anyway.

    On CUDA this also needs the workspace that `lmtrain.system.variables` sets.
    """
    if device.type != "cpu":
        torch.set_deterministic_debug_mode("warn")
        # filling costs time, and no code of lmtrain reads memory that it has not written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def scoped_settings(device: torch.device, num_threads: int | None = None) -> Iterator[None]:
    """Set what PyTorch keeps for a whole process as training needs it, and at the end set it back.

    That is: deterministic algorithms, the current CUDA device, the number of CPU threads (None: as it is), and the
    state of the random generators, which training seeds.
    """
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    threads, random = torch.get_num_threads(), random_state(device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            make_deterministic(device)
            if num_threads is not None:
                torch.set_num_threads(num_threads)
            yield
    finally:
        if num_threads is not None:
            torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        set_random_state(random, device)


def choose_precision(name: str, device: torch.device, size: int) -> tuple[str, str]:
    """Return `fp32` or `bf16`, and the reason: the configured one, or for `auto` the faster one on this device.

    Args:
        size: the hidden size H. The product that is timed computes the gates of an LSTM for 512 tokens,
            (512, H) @ (H, 4H); on a GPU, H is at least 1,024, since smaller products take less time than their launch.
    """
    if name != "auto":
        return name, "as configured"
    if device.type == "cpu" and not has_onednn(torch.bfloat16):
        return "fp32", "oneDNN has no bf16 products for this processor"
    size = size if device.type == "cpu" else max(size, LEAST_TIMED_SIZE)
    shapes = (512, size), (size, 4 * size)
    operands = [
        [torch.ones(shape, device=device, dtype=dtype) for shape in shapes] for dtype in (torch.float32, torch.bfloat16)
    ]
    pairs: list[tuple[float, ...]] = []
    start_s = time.monotonic()
    while len(pairs) < 5 or (len(pairs) < 50 and time.monotonic() - start_s < 0.1):
        pairs.append(tuple(_product_seconds(device, *each) for each in operands))
        if device.type == "cpu" and pairs[0][1] > max(HOPELESS_S, 10 * pairs[0][0]):
            break
    pairs = pairs[1:] or pairs  # the first product of each precision includes preparation
    # the two are timed in turn, and medians compared, since a busy machine slows both; bf16 must win clearly, since
    # its casts cost time too
    chosen = "bf16" if statistics.median(bf16 / fp32 for fp32, bf16 in pairs) < 0.7 else "fp32"
    fp32_ms, bf16_ms = (1e3 * statistics.median(each) for each in zip(*pairs, strict=True))
    return chosen, f"a product of 512 x {size} x {4 * size} takes fp32 {fp32_ms:.2f} ms, bf16 {bf16_ms:.2f} ms"


def _product_seconds(device: torch.device, left: Tensor, right: Tensor) -> float:
    count = 1 if device.type == "cpu" else QUEUED_PRODUCTS
    start_s = time.perf_counter()
    for _ in range(count):
        product = left @ right
    synchronise(device)
    taken_s = time.perf_counter() - start_s
    del product
    return taken_s / count


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
    """Return the state of PyTorch's random generators as uint8 tensors (bytes,), by type of device: `cpu`, `cuda`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the state of PyTorch's random generators to one that `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of this device, the current one of its type.

    `torch.manual_seed` would seed those of all devices, and change what a program that uses lmtrain draws there.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_of(seed: int, step: int, rank: int) -> int:
    """Return a 64-bit seed for one process at one step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
