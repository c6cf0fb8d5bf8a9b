"""How much memory this process has taken at most, and how much is free: on the CPU, or on its GPU."""

import sys
from contextlib import suppress

import torch


def reset_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew. Only Linux can reset the peak of a process; elsewhere it counts from the start."""
    if device.type not in ("cpu", "mps"):
        torch.get_device_module(device).reset_peak_memory_stats(device)
    with suppress(OSError), open("/proc/self/clear_refs", "wb") as handle:
        handle.write(b"5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors took on a GPU, or else that the process took; None if the system (Windows)
    does not say. For Apple's GPU this is what PyTorch holds, which seldom shrinks."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return int(module.driver_allocated_memory() if device.type == "mps" else module.max_memory_allocated(device))
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free or can be freed; None if the system does not say. For Apple's GPU this is
    how much more PyTorch advises to take."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if device.type == "mps":
            return int(module.recommended_max_memory() - module.driver_allocated_memory())
        return int(module.mem_get_info(device)[0])
    with suppress(OSError), open("/proc/meminfo", encoding="utf-8") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return None
