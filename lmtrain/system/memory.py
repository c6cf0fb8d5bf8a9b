"""How much memory this process has taken at most, and how much is free: on the CPU, or on its CUDA device."""

import sys
from contextlib import suppress

import torch

STATUS, MEMORY, RESET = "/proc/self/status", "/proc/meminfo", "/proc/self/clear_refs"  # of Linux: proc(5)


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew. Only Linux forgets the peak of the process; elsewhere it is that since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError), open(RESET, "w") as handle:
        handle.write("5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors took on a CUDA device, or else that the process took; None if the system
    (Windows) does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), open(STATUS) as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free or can be freed; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError), open(MEMORY) as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return None
