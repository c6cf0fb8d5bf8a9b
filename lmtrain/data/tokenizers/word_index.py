"""Finds the words of much text, and the position of each in a list, without a loop over words.

A word is what `str.split` gives. Words are compared byte by byte, never by their hashes alone. A register holds eight
bytes of a word as one number. Shapes: W words, F bytes of a text with its padding.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints

Keys = NDArray[np.uint64]

# stand for a line break, and for the space before a token, where words are cut and counted; texts in NFC never hold
# these two characters, since NFC puts others in their place
LINE_BREAK, SPACE = "\u0344", "\u0340"
LONGEST_BYTES = 24  # an index holds words of three registers at most
PADDING = bytes(32)  # so that a register can be read from each byte of a text on

_WHITE = np.zeros(256, bool)
_WHITE[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True
_OTHER_WHITE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_OTHER_WHITE_STARTS = (b"\xc2\x85", b"\xc2\xa0", b"\xe1\x9a\x80", b"\xe2\x80", b"\xe2\x81\x9f", b"\xe3\x80\x80")
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # keep the first 0 to 8 bytes of a register
_FACTORS = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))  # odd, with mixed bits
_SHIFT = np.uint64(29)


class Words(NamedTuple):
    """The words of a text."""

    flat: NDArray[np.uint8]  # (F,) the text's UTF-8, with padding around it
    starts: Ints  # (W,) in `flat`
    sizes: Ints  # (W,) bytes

    def bytes_of(self, chosen: Ints) -> list[bytes]:
        """Return the words at these positions (chosen,)."""
        data, starts = self.flat.tobytes(), self.starts[chosen]
        ends = starts + self.sizes[chosen]
        return [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def registers(self, chosen: Ints) -> Keys:
        """Return the words at these positions, of 8 bytes at most, as numbers (chosen,) that sort as the bytes do."""
        registers: Keys = np.ndarray((len(self.flat) - 7,), "<u8", self.flat, 0, (1,))
        return (registers[self.starts[chosen]] & _MASKS[self.sizes[chosen]]).byteswap()

    def lengths(self) -> Ints:
        """Return the number of words of each line, (lines,)."""
        before = np.searchsorted(self.starts, np.flatnonzero(self.flat[: -len(PADDING) - 1] == 10))
        return np.diff(before, prepend=0, append=len(self.starts))


def cut_words(text: str) -> Words:
    """Cut a text into words."""
    data = text.encode("utf-8", "surrogatepass")
    # a search for one byte is much faster than one for two
    if any(part[:1] in data and part in data for part in _OTHER_WHITE_STARTS):
        data = _OTHER_WHITE.sub(" ", text).encode("utf-8", "surrogatepass")
    flat = np.frombuffer(b" " + data + b" " + PADDING, np.uint8)
    white = _WHITE.take(flat[: -len(PADDING)])
    edges = np.flatnonzero(white[1:] != white[:-1]) + 1
    return Words(flat, edges[::2], edges[1::2] - edges[::2])


class WordIndex:
    """Finds the positions of words in a list, by a hash table of arrays with linear probing.

    Args:
        words: each once, best the most frequent first; words of more than `LONGEST_BYTES` are never found.
    """

    def __init__(self, words: Sequence[str]) -> None:
        bits = max(10, (4 * len(words)).bit_length())  # at most half full
        self._bits, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        encoded = [word.encode() for word in words]
        sizes = np.array([len(word) for word in encoded], np.int64)
        flat = np.frombuffer(b"".join(encoded) + PADDING, np.uint8)
        keys, slots = self._keys(flat, sizes.cumsum() - sizes, sizes)
        self._table = np.zeros(1 << bits, np.int32)  # position + 1; 0: a free slot
        self._sizes = np.concatenate([[-1], sizes])
        self._registers = [np.concatenate([np.zeros(1, np.uint64), key]) for key in keys]
        remaining = np.flatnonzero(sizes <= LONGEST_BYTES)
        slots = slots[remaining]
        while len(remaining):
            free = self._table[slots] == 0
            self._table[slots[free][::-1]] = remaining[free][::-1] + 1  # the first word gets a contested slot
            without = self._table[slots] != remaining + 1
            remaining, slots = remaining[without], (slots[without] + 1) & self._mask

    def _keys(self, flat: NDArray[np.uint8], starts: Ints, sizes: Ints) -> tuple[list[Keys], Ints]:
        """The three registers of each word, (W,) each, and the slot where its search begins (W,)."""
        registers: Keys = np.ndarray((len(flat) - 7,), "<u8", flat, 0, (1,))  # a register from each byte on
        keys = [registers[starts] & _MASKS[np.minimum(sizes, 8)], *np.zeros((2, len(starts)), np.uint64)]
        mixed = keys[0] * _FACTORS[0]
        long = np.flatnonzero(sizes > 8)
        for number in (1, 2) if len(long) else ():
            size = np.clip(sizes[long] - 8 * number, 0, 8)
            first = np.minimum(starts[long] + 8 * number, len(registers) - 1)  # any byte if the size is 0
            keys[number][long] = registers[first] & _MASKS[size]
            mixed[long] ^= keys[number][long] * _FACTORS[number]
        mixed = (mixed ^ (mixed >> _SHIFT)) * _FACTORS[1]
        return keys, (mixed >> self._bits).view(np.int64)

    def look_up(self, words: Words) -> NDArray[np.int32]:
        """Return the position of each word plus 1, or 0 for a word that is not in the list; (W,)."""
        keys, slots = self._keys(words.flat, words.starts, words.sizes)
        positions = self._table[slots]
        same = (self._registers[0][positions] == keys[0]) & (self._sizes[positions] == words.sizes)
        long = np.flatnonzero(words.sizes > 8)
        for number in (1, 2):
            same[long] &= self._registers[number][positions[long]] == keys[number][long]
        remaining = np.flatnonzero(~same & (positions > 0))
        positions *= same
        while len(remaining):
            slots[remaining] = (slots[remaining] + 1) & self._mask
            other = self._table[slots[remaining]]
            same = self._sizes[other] == words.sizes[remaining]
            for number in range(3):
                same &= self._registers[number][other] == keys[number][remaining]
            positions[remaining[same]] = other[same]
            remaining = remaining[~same & (other > 0)]
        return positions
