"""The errors that a user can cause or meet, each with its exit code.

Raise one of these for a fault of a file, a command line or the machine, and `assert` what only a bug can break. The
command line prints each of `faults` on a line and exits with `exit_code`. Any other exception is a bug and shows its
traceback.
"""

import re
import unicodedata

# these characters reorder the text around them, so that a line can look like another: https://trojansource.codes
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def escape(text: str, kept: str = "\n\t") -> str:
    """Write out the control characters of a text (`\\x1b`) except those `kept`, so that it can't drive a terminal."""

    def write_out(character: str) -> str:
        control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDIRECTIONAL
        if not control or character in kept:
            return character
        return f"\\x{ord(character):02x}" if character <= "\xff" else f"\\u{ord(character):04x}"

    return text if text.isascii() and text.isprintable() else "".join(map(write_out, text))


class LmtrainError(Exception):
    """A fault that is not a bug of lmtrain.

    Args:
        *faults: one line on each fault: place, fault and remedy. All faults are given, so that the user can correct
            them together. A line may quote any character; control characters are written out.
    """

    exit_code = 1

    def __init__(self, *faults: str) -> None:
        self.faults = tuple(escape(fault, kept="") for fault in faults)
        super().__init__("\n".join(self.faults))


class ConfigError(LmtrainError):
    """A fault of usage or of a configuration file."""

    exit_code = 2


class DataError(LmtrainError):
    """A fault in the text or ids that lmtrain reads."""

    exit_code = 3


class ArtefactError(LmtrainError):
    """A run directory, checkpoint or tokenizer file that can't be used as it is."""

    exit_code = 4


class StorageError(LmtrainError):
    """Reading or writing failed: the disk is full, a permission is missing, or another process holds the run."""

    exit_code = 5


class DivergedError(LmtrainError):
    """The loss or the gradient is no longer a finite number."""

    exit_code = 6


class OutOfMemoryError(LmtrainError):
    """The memory of the machine or of the device is too small."""

    exit_code = 7


class StoppedError(LmtrainError):
    """A signal ended the training, and its state was saved. The exit code is 128 + `signal_number`, as in shells."""

    def __init__(self, signal_number: int, *faults: str) -> None:
        super().__init__(*faults)
        self.exit_code = 128 + signal_number


class PeerError(LmtrainError):
    """Another of the processes that train together reports a fault, so this one only exits with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


# how PyTorch, the system and the loader of libraries say that memory ran out
MEMORY_RAN_OUT = re.compile(
    "can(?:'t|not) allocate memory|not enough memory|bad_alloc|out of memory|failed to map segment|"
    "can't start new thread",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException, remedy: str) -> OutOfMemoryError | None:
    """Return an `OutOfMemoryError` to raise in place of an error that says that memory ran out; None for others."""
    matches = isinstance(error, RuntimeError | ImportError | OSError) and MEMORY_RAN_OUT.search(str(error))
    return OutOfMemoryError(f"out of memory: {remedy}") if matches or isinstance(error, MemoryError) else None
