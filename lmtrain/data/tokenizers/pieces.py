"""Subwords of much text at once: each piece between two spaces is encoded once and remembered.

The library's byte-level tokenizers cut text by GPT-2's pattern before they look for subwords,

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

None of its alternatives goes over a space that follows on a character that is none, and none looks back. So text
whose white space is single spaces may be cut before each of them, and the pieces have the ids that the whole has
(tests/data/test_tokenizers.py holds the two against each other). Other text is encoded as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints

MOST_PIECES = 1 << 18  # remembered; then all but the first half, which came early and often, are forgotten
TOGETHER = 64  # new pieces that are given to the library in one line
_OTHER_WHITE = re.compile("[\t\n\x0b\x0c\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_WORD = re.compile(r" \S+")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def cuts_at_spaces(content: dict[str, Any]) -> bool:
    """Whether a tokenizer of the library, as its JSON has it, encodes each piece as it would in the whole text."""
    pre_tokenizer = {key: value for key, value in (content.get("pre_tokenizer") or {}).items() if key in _BYTE_LEVEL}
    others = ("normalizer", "post_processor", "truncation", "padding", "added_tokens")
    is_random = content["model"].get("dropout")
    return pre_tokenizer == _BYTE_LEVEL and not is_random and not any(content.get(key) for key in others)


def _is_even(text: str) -> bool:
    """Whether all white space is single spaces."""
    return "  " not in text and _OTHER_WHITE.search(text) is None


class Pieces:
    """Ids of texts by those of their pieces.

    Args:
        encode: gives the ids of each of some texts.
        sizes: bytes that each id stands for.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], sizes: Sequence[int]) -> None:
        self._encode, self._sizes = encode, np.array(sizes, np.int64)
        self._known: dict[str, int] = {}  # the place of each piece
        self._ids, self._ends = np.zeros(0, np.int64), np.zeros(1, np.int64)  # of all pieces; from place to place + 1

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Flat ids (T,) of all texts, and the number of ids of each (texts,)."""
        if _is_even("".join(texts)):
            pieces = "\n".join(texts).replace(" ", "\n ").split("\n")
            counts = np.fromiter(map(str.count, texts, repeat(" ")), np.int64, len(texts)) + 1
        else:
            cut = [text.replace(" ", "\n ").split("\n") if _is_even(text) else [text] for text in texts]
            pieces = [piece for part in cut for piece in part]
            counts = np.fromiter(map(len, cut), np.int64, len(cut))
        places = self._places(pieces)
        lengths = (self._ends[1:] - self._ends[:-1])[places]
        ends = lengths.cumsum()
        flat = self._ids[np.repeat(self._ends[places] - ends + lengths, lengths) + np.arange(lengths.sum())]
        return flat, np.diff(ends[counts.cumsum() - 1], prepend=0)

    def _places(self, pieces: list[str]) -> Ints:
        if len(self._known) > MOST_PIECES:
            kept = MOST_PIECES // 2
            self._known = dict(islice(self._known.items(), kept))
            self._ids, self._ends = self._ids[: self._ends[kept]], self._ends[: kept + 1]
        places = np.fromiter(map(self._known.get, pieces, repeat(-1)), np.int64, len(pieces))
        missing = np.flatnonzero(places < 0).tolist()
        if missing:
            self._learn(list(dict.fromkeys(pieces[place] for place in missing)))
            places[missing] = [self._known[pieces[place]] for place in missing]
        return places

    def _learn(self, new: list[str]) -> None:
        words = [piece for piece in new if _WORD.fullmatch(piece)]
        found = self._encode_together(words)
        if found is None:
            words = []
        else:
            self._keep(words, *found)
        taken = set(words)
        others = [piece for piece in new if piece not in taken]
        encoded = self._encode(others)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self._keep(others, np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths.sum())), lengths.cumsum())

    def _keep(self, pieces: list[str], ids: Ints, ends: Ints) -> None:
        self._known.update(zip(pieces, range(len(self._known), len(self._known) + len(pieces)), strict=True))
        self._ids, self._ends = np.concatenate([self._ids, ids]), np.concatenate([self._ends, ends + len(self._ids)])

    def _encode_together(self, words: list[str]) -> tuple[Ints, Ints] | None:
        """Ids of pieces, many in a line, which costs a third; None: which ids are whose can't be told."""
        lines = ["".join(words[start : start + TOGETHER]) for start in range(0, len(words), TOGETHER)]
        ids = np.array(list(chain.from_iterable(self._encode(lines))), np.int64)
        reached = np.concatenate([[0], self._sizes[ids].cumsum()])
        wanted = np.array([len(word.encode()) for word in words], np.int64).cumsum()
        ends = np.searchsorted(reached, wanted).clip(max=len(ids))
        whole = (reached[ends] == wanted).all() and (ends[-1] if len(words) else 0) == len(ids)
        return (ids, ends) if whole else None
