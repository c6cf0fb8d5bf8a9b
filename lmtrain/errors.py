"""The faults a user can cause or meet, each with the exit code of its kind.

Raise one of these for what a file, a command line or the machine can cause; `assert` what only a bug can.
The command line prints `faults`, one a line, and leaves with `exit_code`; anything else that is raised is a
bug and shows its traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

# they reorder the text around them, so that a line may read as what it is not: https://trojansource.codes
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape(text: str, kept: str = "\n\t") -> str:
    """Text whose control characters are written out (`\\x1b`), so that it can't drive a terminal.

    Args:
        kept: control characters that stay.
    """

    def written_out() -> Iterator[str]:
        for character in text:
            control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDIRECTIONAL
            if not control or character in kept:
                yield character
            else:
                yield f"\\x{ord(character):02x}" if character <= "\xff" else f"\\u{ord(character):04x}"

    return text if text.isascii() and text.isprintable() else "".join(written_out())


class LmtrainError(Exception):
    """A fault that is not a bug of lmtrain: what is wrong, where, and the mend.

    Args:
        *faults: one line each; all that were found, so that they can be mended at once. What they quote may hold any
            character; control characters are written out.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(escape(fault, kept="") for fault in faults)
        super().__init__("\n".join(self.faults))


class ConfigError(LmtrainError):
    """A fault of usage or of a configuration file."""

    exit_code = 2


class DataError(LmtrainError):
    """A fault in the text or ids that were to be read."""

    exit_code = 3


class ArtefactError(LmtrainError):
    """A run directory, checkpoint or tokenizer file that can't be used as it is."""

    exit_code = 4


class StorageError(LmtrainError):
    """Reading or writing failed: no room, no permission, a run that another process holds."""

    exit_code = 5


class DivergedError(LmtrainError):
    """The loss or the gradient is not a finite number any more."""

    exit_code = 6


class OutOfMemoryError(LmtrainError):
    """The machine's or the device's memory does not suffice."""

    exit_code = 7


class StoppedError(LmtrainError):
    """A signal ended the training, after its state was saved.

    Args:
        signal_number: the signal; the exit code is 128 + signal_number, as shells have it.
    """

    def __init__(self, signal_number: int, *faults: str) -> None:
        super().__init__(*faults)
        self.exit_code = 128 + signal_number


class PeerError(LmtrainError):
    """Another of the processes that train together has a fault, and tells of it.

    Args:
        exit_code: of that fault's kind.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def out_of_memory(error: BaseException, mend: str) -> OutOfMemoryError | None:
    """The error to raise in place of one that says memory ran out, in any of the ways in which Python, PyTorch and the
    loader of libraries do; else None."""
    signs = [
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
        "out of memory",
        "cannot allocate memory",
        "failed to map segment",
        "can't start new thread",
    ]
    said = isinstance(error, RuntimeError | ImportError | OSError) and any(sign in str(error).lower() for sign in signs)
    return OutOfMemoryError(f"out of memory: {mend}") if said or isinstance(error, MemoryError) else None
