"""Encodes the texts of a block between start and end tokens. Shapes: S texts, T ids without start and end tokens."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.base import Measured, Tokenizer
from lmtrain.errors import DataError


def encode_block(tokenizer: Tokenizer, block: Block) -> Measured:
    """Encode the texts of a block; raises DataError with the place of its fault."""
    try:
        return tokenizer.encode_measured(block.texts)
    except DataError:
        for number, text in zip(block.lines, block.texts, strict=True):  # once more, to find the place
            column = 0
            for word in text.split():
                column = text.index(word, column)
                try:
                    tokenizer.encode(word)
                except DataError as error:
                    raise DataError(f"{block.path}:{number}:{column + 1}: {error}") from None
                column += len(word)
        raise


def frame_texts(
    flat: Ints, lengths: Ints, end: int, start: int | None, dtype: DTypeLike = np.int64
) -> tuple[NDArray[Any], Ints]:
    """Put a start token before each text, unless it is None, and an end token after it.

    `flat` are ids (T,), with `lengths` (S,). Returns the framed ids, (T + S,) or (T + 2 S,), and each text's end (S,).
    """
    added = 1 if start is None else 2
    ends = (lengths + added).cumsum()
    framed = np.empty(int(ends[-1]), dtype)
    inner = np.ones(len(framed), bool)
    starts = ends - lengths - added
    framed[ends - 1], inner[ends - 1] = end, False
    if start is not None:
        framed[starts], inner[starts] = start, False
    framed[inner] = flat
    return framed, ends
