"""Gives each letter one spelling."""

import unicodedata


def normalise(text: str) -> str:
    """Return the text in NFC: a letter has one spelling, whether it was typed composed or not (Hangul, accents)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
