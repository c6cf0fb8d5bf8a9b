"""Requests the pages of a memory-mapped array before they are read, and releases them afterwards.

The pages that a process has read of a map count as its memory until it releases them, although the system could take
them back at any time. They stay in the system's cache. Both functions leave an array that is not mapped as it is, and
do nothing on Windows, which has no such calls.
"""

import mmap
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def prefetch_pages(array: NDArray[Any], ranges: Iterable[tuple[int, int]]) -> None:
    """Ask the system to read these ranges, (first, end) in elements, while this process continues."""
    if sys.platform != "win32" and (found := _find_map(array)) is not None:
        mapped, before_bytes = found
        for first, end in ranges:
            start = (before_bytes + first * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, start, before_bytes + end * array.itemsize - start)


def release_pages(array: NDArray[Any]) -> None:
    """Release all pages of the array's file; those that are read again are mapped again."""
    if sys.platform != "win32" and (found := _find_map(array)) is not None:
        found[0].madvise(mmap.MADV_DONTNEED)


def _find_map(array: NDArray[Any]) -> tuple[mmap.mmap, int] | None:
    """The map that an array lies in, and the bytes of the map before the array."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not array.size:
        return None
    return base, array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
