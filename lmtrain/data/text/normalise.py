"""Gives each letter and each line end one spelling."""

import re
import unicodedata

_LINE_END = re.compile(r"\r(?:\r?\n)?")


def normalise(text: str) -> str:
    """Return the text in NFC, with `\\n` for `\\r\\r\\n`, `\\r\\n` and `\\r`.

    In NFC a letter has one spelling, whether it was typed composed or not (Hangul, accents).
    """
    if "\r" in text:
        text = _LINE_END.sub("\n", text)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def spellings_of(text: str) -> list[str]:
    """Return the ways in which a text may be spelled in a file: composed and, where that differs, decomposed."""
    composed = normalise(text)
    return list(dict.fromkeys([composed, unicodedata.normalize("NFD", composed)]))
