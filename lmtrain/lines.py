"""Lines for people: what a terminal may be shown, and how standard error is told."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress

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


def is_text(text: str) -> bool:
    """Whether this can stand in a file of UTF-8: no NUL, no half of a surrogate pair."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def decode(data: bytes, name: str) -> str:
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
