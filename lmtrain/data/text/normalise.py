"""Gives each letter and each line end one spelling."""

import unicodedata


def normalise(text: str) -> str:
    """Return the text in NFC, with `\\n` for `\\r\\r\\n`, `\\r\\n` and `\\r`.

    In NFC a letter has one spelling, whether it was typed composed or not (Hangul, accents).
    """
    if "\r" in text:
        text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() else unicodedata.normalize("NFC", text)
