"""Which pages of a memory-mapped array are in memory: asked for before they are read, let go when they are done with.

What was read of a map counts as this process's memory until it is let go, though the system could take it back at any
time; it stays in the system's cache. An array that is not mapped from a file is left as it is.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def prefetch_pages(array: NDArray[Any], stretches: Iterable[tuple[int, int]]) -> None:
    """Have the system read these stretches, (first, end) in elements, while this process goes on."""
    if (home := _home(array)) is None:
        return
    mapped, before = home
    for first, end in stretches:
        start = (before + first * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, start, before + end * array.itemsize - start)


def release_pages(array: NDArray[Any]) -> None:
    """Let go of all that was read of the file; what is read again is mapped again."""
    if (home := _home(array)) is not None:
        home[0].madvise(mmap.MADV_DONTNEED)


def _home(array: NDArray[Any]) -> tuple[mmap.mmap, int] | None:
    """The map that an array lies in, and how many bytes of it stand before the array."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not array.size:
        return None
    return base, array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
