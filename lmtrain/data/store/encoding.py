"""What is made of one block of a corpus, without regard to any other: any process can do it.

Shapes: T tokens, S sequences of the block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Ids, Tokenizer
from lmtrain.data.tokenizers.framing import encode_block, frame_texts

HASHED_TOKENS = 1 << 15  # at once: what stays in a processor's cache


class BlockResult(NamedTuple):
    """What is made of a block: figures, and arrays as bytes."""

    figures: dict[str, Any]
    parts: list[bytes]


def token_type(vocab_size: int) -> str:
    """The narrowest type of a store's ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class BlockEncoder:
    """From a block to its part of a token store.

    Answers with the figures that `StoreCounts` sums up, and as parts the ids with their frames (T,), where each
    sequence ends (S,) uint64, counted from the block's begin, and their hashes (S,) uint64.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self._type = np.dtype(token_type(tokenizer.vocab_size)).newbyteorder("<")

    def answer(self, raw: RawBlock) -> BlockResult:
        """The ids of a block; raises DataError with the place of its fault."""
        stream = self.source.stream
        block = self.source.parse(raw)
        texts = block.texts if stream else list(filter(str.strip, block.texts))
        blank = len(block.texts) - len(texts)
        if self.source.part != "all":
            block = self.source.kept(block)
            texts = block.texts if stream else list(filter(str.strip, block.texts))
        if not texts:
            return BlockResult({"blank": blank}, [b"", b"", b""])
        flat, lengths = encode_block(self.tokenizer, block, texts)
        framed, ends = frame_texts(
            flat, lengths, self.tokenizer.eos_id, None if stream else self.tokenizer.bos_id, self._type
        )
        newlines = len(texts)
        if stream and raw.last and not block.ended:  # no newline, no end token
            framed, newlines = framed[:-1], newlines - 1
            ends = ends[: len(ends) - (lengths[-1] == 0)]
            ends[-1:] = len(framed)
            if not len(ends):
                return BlockResult({"blank": blank}, [b"", b"", b""])
        whole = "".join(texts)
        figures = {
            "sequences": len(ends),
            "tokens": len(framed),
            "unknown_tokens": 0 if self.tokenizer.unk_id is None else int((flat == self.tokenizer.unk_id).sum()),
            "characters": len(whole) + newlines,
            "bytes": len(whole if whole.isascii() else whole.encode()) + newlines,
            "blank": blank,
            "longest": int(lengths.max()),
        }
        return BlockResult(figures, [framed.tobytes(), ends.astype("<u8").tobytes(), hashes(framed, ends).tobytes()])

    def rest(self) -> BlockResult:
        """What is left at the end: nothing."""
        return BlockResult({}, [])


def hashes(framed: NDArray[np.integer], ends: Ids) -> NDArray[np.uint64]:
    """A 64-bit hash of each sequence: its (place, id) pairs, mixed by splitmix64's last steps and summed."""
    found, first = [], 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + HASHED_TOKENS, "right")))
        part = ends[first:last] - begin
        starts = np.concatenate([[0], part[:-1]])
        place = np.arange(int(part[-1]), dtype=np.uint64)
        place -= np.repeat(starts, part - starts).astype(np.uint64)
        mixed = framed[begin : begin + len(place)].astype(np.uint64)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed += place
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        found.append(np.add.reduceat(mixed, starts))
        first = last
    return np.concatenate(found).astype("<u8", copy=False)
