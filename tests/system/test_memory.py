"""The peak of memory, on systems that count it otherwise or not at all."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lmtrain.system import memory

CPU = torch.device("cpu")


def test_the_peak_follows_what_is_taken_and_can_begin_anew():
    """In a process of its own, which holds no freed memory."""
    code = """
import torch
from lmtrain.system.memory import free_bytes, peak_bytes, reset_peak
cpu = torch.device("cpu")
torch.ones(50_000_000)
reset_peak(cpu)
before = peak_bytes(cpu)
torch.ones(25_000_000)
print(peak_bytes(cpu) - before, free_bytes(cpu))
"""
    more, free = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split())
    assert 90e6 < more < 130e6
    assert free > 0


@pytest.mark.parametrize(("platform", "wanted"), [("linux", 5_120_000), ("darwin", 5_000), ("win32", None)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, wanted):
    """macOS counts in bytes, others in KiB, and Windows has no module `resource`."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5_000))
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else usage)
    monkeypatch.setattr(sys, "platform", platform)

    def absent(name, *more, **options):
        raise FileNotFoundError(name)

    monkeypatch.setattr(memory, "open", absent, raising=False)
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) == wanted
    assert memory.free_bytes(CPU) is None
