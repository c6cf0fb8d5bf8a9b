"""Encodes a block of a corpus for a token store. Blocks do not depend on each other, so any process can encode any.

Shapes: T tokens and S sequences of the block, start and end tokens included.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.framing import encode_block, frame_texts
from lmtrain.data.tokenizers.loading import parse_tokenizer

HASHED_TOKENS = 1 << 15  # hashed at once: they fit into a processor's cache


class BlockResult(NamedTuple):
    """A block's part of a store; its arrays are given as the bytes to be written."""

    figures: dict[str, int]  # what `StoreCounts` adds up over all blocks
    tokens: bytes = b""  # (T,) of the store's type
    ends: bytes = b""  # (S,) uint64: where each sequence ends, counted from the start of the block
    hashes: bytes = b""  # (S,) uint64


def token_type(vocab_size: int) -> str:
    """Return the narrowest type that holds the ids of a store."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class BlockEncoder:
    """Encodes blocks of a source, as a task of a worker. `tokenizer` is what `Tokenizer.dumps` returns."""

    def __init__(self, source: Source, tokenizer: str) -> None:
        self.source, self.tokenizer = source, parse_tokenizer(tokenizer)
        self._type = np.dtype(token_type(self.tokenizer.vocab_size)).newbyteorder("<")

    def work(self, raw: RawBlock) -> BlockResult:
        """Encode a block; raises DataError with the place of its fault."""
        stream = self.source.stream
        parsed = self.source.parse(raw)
        block = self.source.sequences(parsed)
        counts_blank = len(block.texts) < len(parsed.texts) and not self.source.keeps_blank
        blank = sum(not text.strip() for text in parsed.texts) if counts_blank else 0
        if not (texts := block.texts):
            return BlockResult({"blank": blank})
        flat, lengths, characters, size = encode_block(self.tokenizer, block)
        framed, ends = frame_texts(
            flat, lengths, self.tokenizer.eos_id, None if stream else self.tokenizer.bos_id, self._type
        )
        newlines = len(texts)
        if raw.unfinished or (stream and raw.last and not block.ended):  # the last text gets no end token
            framed, newlines = framed[:-1], newlines - 1
            newlines += raw.unfinished and self.tokenizer.separator == " "  # words that fold the space at the cut
            ends = ends[:-1] if raw.unfinished or not lengths[-1] else np.append(ends[:-1], len(framed))
        figures = {
            "sequences": len(ends),
            "tokens": len(framed),
            "unknown_tokens": 0 if self.tokenizer.unk_id is None else int((flat == self.tokenizer.unk_id).sum()),
            "characters": characters + newlines,
            "bytes": size + newlines,
            "blank": blank,
            "longest": int(lengths.max()),
        }
        return BlockResult(figures, framed.tobytes(), ends.astype("<u8").tobytes(), _hashes(framed, ends).tobytes())

    def finish(self) -> BlockResult:
        """Nothing is left after the last block."""
        return BlockResult({})


def _hashes(framed: NDArray[np.integer], ends: Ints) -> NDArray[np.uint64]:
    """Hash each sequence to 64 bits, (S,): its (position, id) pairs, mixed by splitmix64's last steps and summed.

    `framed` are ids (T,); `ends` (S,) says where each sequence ends in them.
    """
    parts, first = [np.zeros(0, np.uint64)], 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, begin + HASHED_TOKENS, "right")))
        part_ends = ends[first:last] - begin
        starts = np.concatenate([[0], part_ends[:-1]])
        positions = np.arange(int(part_ends[-1]), dtype=np.uint64)
        positions -= np.repeat(starts, part_ends - starts).astype(np.uint64)
        mixed = framed[begin : begin + len(positions)].astype(np.uint64)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed += positions
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        parts.append(np.add.reduceat(mixed, starts))
        first = last
    return np.concatenate(parts).astype("<u8", copy=False)
