"""The peak of memory, on systems that count it otherwise or not at all."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lmtrain.system import memory

CPU = torch.device("cpu")


def test_the_peak_follows_what_is_taken_and_can_begin_anew():
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    taken = torch.ones(25_000_000)
    assert memory.peak_bytes(CPU) - before > 90e6
    del taken
    assert memory.free_bytes(CPU) > 0


@pytest.mark.parametrize(("platform", "wanted"), [("linux", 5_120_000), ("darwin", 5_000), ("win32", None)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, wanted):
    """macOS counts in bytes, others in KiB, and Windows has no module `resource`."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5_000))
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else usage)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("STATUS", "MEMORY", "RESET"):
        monkeypatch.setattr(memory, name, "/absent/file")
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) == wanted
    assert memory.free_bytes(CPU) is None
