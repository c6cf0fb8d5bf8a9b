"""Encodes much text to subwords: each piece from one space to the next is encoded once and remembered.

The library's byte-level tokenizers cut text by GPT-2's pattern before they look for subwords,

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

None of its alternatives matches across a space that follows a character that is no space, and none looks back. So a
text whose white space is single spaces may be cut before each space, and its pieces have the same ids as the whole
(tests/data/test_fast_tokenizers.py compares the two). Any other text is encoded whole. Shapes: S texts, T ids of all.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain, islice, repeat
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints

MOST_PIECES = 1 << 18  # pieces to remember; beyond, the later half is forgotten, since frequent pieces come early
TOGETHER = 64  # new pieces that the library encodes as one text
_OTHER_WHITE = re.compile("[\t\n\x0b\x0c\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_WORD = re.compile(r" \S+")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def cuts_at_spaces(content: dict[str, Any]) -> bool:
    """Tell whether the library's tokenizer with this JSON gives a piece the same ids as in the whole text."""
    pre_tokenizer = {key: value for key, value in (content.get("pre_tokenizer") or {}).items() if key in _BYTE_LEVEL}
    others = ("normalizer", "post_processor", "truncation", "padding", "added_tokens")
    is_random = content["model"].get("dropout")
    return pre_tokenizer == _BYTE_LEVEL and not is_random and not any(content.get(key) for key in others)


def _has_single_spaces(text: str) -> bool:
    """Whether all white space of a text is single spaces."""
    return "  " not in text and _OTHER_WHITE.search(text) is None


class Pieces:
    """Encodes texts piece by piece, and remembers the ids of the pieces.

    Args:
        encode: encodes a list of texts, and returns the ids of each.
        sizes: the number of bytes of each id; None if an id says nothing of how many bytes it stands for.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], sizes: Sequence[int] | None) -> None:
        self._encode, self._sizes = encode, None if sizes is None else np.array(sizes, np.int64)
        self._known: dict[str, int] = {}  # the number of each piece
        self._ids = np.zeros(0, np.int64)  # the ids of all known pieces, one after the other
        self._ends = np.zeros(1, np.int64)  # piece n has the ids from _ends[n] to _ends[n + 1]

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Encode texts: flat ids (T,), and the number of ids of each (S,), as `Tokenizer.encode_texts` does."""
        if _has_single_spaces("".join(texts)):
            pieces = "\n".join(texts).replace(" ", "\n ").split("\n")
            counts = np.fromiter(map(str.count, texts, repeat(" ")), np.int64, len(texts)) + 1
        else:
            cut = [text.replace(" ", "\n ").split("\n") if _has_single_spaces(text) else [text] for text in texts]
            pieces = [piece for part in cut for piece in part]
            counts = np.fromiter(map(len, cut), np.int64, len(cut))
        numbers = self._numbers_of(pieces)
        lengths = (self._ends[1:] - self._ends[:-1])[numbers]
        ends = lengths.cumsum()
        flat = self._ids[np.repeat(self._ends[numbers] - ends + lengths, lengths) + np.arange(lengths.sum())]
        return flat, np.diff(ends[counts.cumsum() - 1], prepend=0)

    def _numbers_of(self, pieces: list[str]) -> Ints:
        if len(self._known) > MOST_PIECES:
            kept = MOST_PIECES // 2
            self._known = dict(islice(self._known.items(), kept))
            self._ids, self._ends = self._ids[: self._ends[kept]], self._ends[: kept + 1]
        numbers = np.fromiter(map(self._known.get, pieces, repeat(-1)), np.int64, len(pieces))
        missing = np.flatnonzero(numbers < 0).tolist()
        if missing:
            self._learn(list(dict.fromkeys(pieces[position] for position in missing)))
            numbers[missing] = [self._known[pieces[position]] for position in missing]
        return numbers

    def _learn(self, new: list[str]) -> None:
        words = [piece for piece in new if _WORD.fullmatch(piece)]
        if (together := self._encode_together(words)) is not None:
            self._remember(words, *together)
        others = [piece for piece in new if piece not in self._known]
        encoded = self._encode(others)
        ends = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
        self._remember(others, np.fromiter(chain.from_iterable(encoded), np.int64), ends)

    def _remember(self, pieces: list[str], ids: Ints, ends: Ints) -> None:
        self._known.update(zip(pieces, range(len(self._known), len(self._known) + len(pieces)), strict=True))
        self._ids, self._ends = np.concatenate([self._ids, ids]), np.concatenate([self._ends, ends + len(self._ids)])

    def _encode_together(self, words: list[str]) -> tuple[Ints, Ints] | None:
        """Encode many pieces as one text, in a third of the time: flat ids, and where those of each piece end.

        Returns None if an id spans two pieces, or may do so.
        """
        if self._sizes is None:
            return None
        lines = ["".join(words[start : start + TOGETHER]) for start in range(0, len(words), TOGETHER)]
        ids = np.array(list(chain.from_iterable(self._encode(lines))), np.int64)
        reached = np.concatenate([[0], self._sizes[ids].cumsum()])
        wanted = np.array([len(word.encode()) for word in words], np.int64).cumsum()
        ends = np.searchsorted(reached, wanted).clip(max=len(ids))
        whole = (reached[ends] == wanted).all() and (ends[-1] if len(words) else 0) == len(ids)
        return (ids, ends) if whole else None
