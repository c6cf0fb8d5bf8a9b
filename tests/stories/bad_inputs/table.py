"""The tables of bad inputs: what a row is, how inputs are made, how a folder and the memory are looked at."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LONGEST_S = 2.0
MOST_BYTES = 200_000_000
HASHED_BYTES = 64 << 20  # of a larger, sparse file size and time stand for its content

IDS = "tokenizer.kind=ids tokenizer.vocab_size=9 logging.sample_prompts=[] data.valid=null"


class Row(NamedTuple):
    """One bad input: what is typed, and all that may come of it."""

    command: str  # as at a shell, behind `lmtrain`
    said: str  # all of stderr but its last newline; {here} is the working directory, {words} what a library words
    code: int
    make: Callable[[], object] = lambda: None  # puts the bad input into the working directory


def pattern(said: str) -> str:
    """A regular expression of what is said, in which {words} stands for at least one character of a line."""
    return re.escape(said.replace("{here}", os.getcwd()) + "\n").replace(re.escape("{words}"), "[^\n]+")


def listing(left_out: tuple[str, ...] = ()) -> dict[str, tuple[object, ...]]:
    """Every path below the working directory with its type, size and content."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, names, files in os.walk("."):
        names[:] = [name for name in names if os.path.relpath(os.path.join(folder, name)) not in left_out]
        for name in (*names, *files):
            path = Path(folder, name)
            status = path.lstat()
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                large = status.st_size > HASHED_BYTES
                content = status.st_mtime_ns if large else hashlib.sha256(path.read_bytes()).hexdigest()
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[str(path)] = (stat.S_IFMT(status.st_mode), size, content)
    return found


def forget_peak() -> None:
    """Begin to measure this process's peak of memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process ever held, Python's and native."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def text(path: str, content: str | bytes) -> Callable[[], object]:
    """A file of this content."""
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def fifo(path: str) -> Callable[[], object]:
    """A pipe with a name that nobody writes to: who opens it, waits."""
    return lambda: os.mkfifo(path)


def link(path: str, target: str) -> Callable[[], object]:
    return lambda: os.symlink(target, path)


def folder(path: str) -> Callable[[], object]:
    return lambda: os.mkdir(path)


def sparse(path: str, size: int) -> Callable[[], object]:
    """A file of NULs that takes no room."""

    def make() -> None:
        with open(path, "wb") as handle:
            handle.truncate(size)

    return make


def both(*makes: Callable[[], object]) -> Callable[[], object]:
    """One after the other."""
    return lambda: [make() for make in makes]
