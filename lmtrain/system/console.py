"""Lines on standard error, and the text that a file or a terminal can hold."""

import sys
from collections.abc import Callable
from contextlib import suppress

from lmtrain.errors import ConfigError, escape

Notify = Callable[[str], None]
"""A function that shows one line to the user."""


def is_text(text: str) -> bool:
    """Tell whether a UTF-8 text file can hold this string: it has no NUL and no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def decode_utf8(data: bytes, name: str) -> str:
    """Decode a small UTF-8 file without its byte order mark; raises ConfigError with file, line and column."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = f"{name}:{before.count(10) + 1}:{len(before) - before.rfind(10)}: byte {error.start}"
        raise ConfigError(f"{place} is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)") from None


def say(line: str) -> None:
    """Print a line on standard error. If nobody reads standard error any more, the program continues."""
    with suppress(OSError, ValueError):
        print(escape(line), file=sys.stderr, flush=True)
