"""Lines for people: what a terminal may be shown, and how standard error is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from lmtrain.errors import escape

Notify = Callable[[str], None]
"""A function that shows one line to the user."""


def is_text(text: str) -> bool:
    """Whether this can stand in a file of UTF-8: no NUL, no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def decode_utf8(data: bytes, name: str) -> str:
    """A small file of UTF-8, a BOM left out; raises ValueError with the place."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = f"{name}:{before.count(10) + 1}:{len(before) - before.rfind(10)}"
        raise ValueError(f"{place}: byte {error.start} is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)") from None


def say(line: str) -> None:
    """A line on standard error; nothing ends because nobody listens any more."""
    with suppress(OSError, ValueError):
        print(escape(line), file=sys.stderr, flush=True)
