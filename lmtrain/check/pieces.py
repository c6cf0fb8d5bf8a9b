"""How `lmtrain check` writes tokens and texts, so that a reader sees where one token ends and the next one begins.

A space is written `␣`, a line break `\\n`, a tab `\\t`, and a byte that is no whole character `\\xec`. Between two
tokens stands `|`; a token's own `|` and `\\` get a backslash.
"""

import json
import re
import unicodedata
from collections.abc import Callable

from lmtrain.data.tokenizers.base import FIRST, SPECIAL_TOKENS, Tokenizer
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import escape

VISIBLE = {ord(" "): "␣", ord("\n"): "\\n", ord("\t"): "\\t", ord("|"): "\\|", ord("\\"): "\\\\"}
VISIBLE |= {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}  # as "surrogateescape" decodes a lone byte


def token_writer(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function that writes out one token of this tokenizer by its id."""
    if isinstance(tokenizer, IdsTokenizer):
        return str
    subword = _subword_writer(tokenizer) if isinstance(tokenizer, SubwordTokenizer) else None

    def write(token: int) -> str:
        if token < FIRST:
            return SPECIAL_TOKENS[token]
        if subword is not None:
            text = subword(token)
        elif isinstance(tokenizer, ByteTokenizer):
            text = bytes([token - FIRST]).decode("utf-8", "surrogateescape")
        else:
            text = tokenizer.decode([token])
        return escape(text.translate(VISIBLE), kept="")

    return write


def _subword_writer(tokenizer: SubwordTokenizer) -> Callable[[int], str]:
    """The library names tokens in an alphabet of its own, which its decoder undoes for whole texts only."""
    decoder = json.dumps(json.loads(tokenizer.library.to_str())["decoder"])
    alphabet = _byte_alphabet() if "ByteLevel" in decoder else {}
    marks_spaces = "Metaspace" in decoder or '"▁"' in json.dumps(json.loads(decoder), ensure_ascii=False)

    def write(token: int) -> str:
        name = tokenizer.library.id_to_token(token - FIRST) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)]).decode("utf-8", "surrogateescape")
        if alphabet and all(letter in alphabet for letter in name):
            return bytes(alphabet[letter] for letter in name).decode("utf-8", "surrogateescape")
        return name.replace("▁", " ") if marks_spaces else name

    return write


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of byte-level tokenizers stands for (GPT-2, https://github.com/openai/gpt-2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # these bytes are written as themselves
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def cut(text: str, columns: int) -> str:
    """Return a text that takes at most `columns` columns of a terminal, an ellipsis in place of its rest.

    Letters of Chinese, Japanese and Korean take two columns each.
    """
    taken = 0
    for place, letter in enumerate(text):
        taken += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if taken > columns - (place < len(text) - 1):
            return text[:place] + "…"
    return text
