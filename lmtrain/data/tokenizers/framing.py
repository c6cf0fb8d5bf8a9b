"""Texts of a block to ids between their start and end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.base import Ids, Tokenizer
from lmtrain.errors import DataError


def encode_block(tokenizer: Tokenizer, block: Block, texts: Sequence[str]) -> tuple[Ids, Ids]:
    """The flat ids and lengths of these texts of a block; raises DataError with the place."""
    try:
        return tokenizer.encode_texts(texts)
    except DataError:
        for number, text in zip(block.lines, block.texts, strict=True):  # once more, for the place
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
    flat: Ids, lengths: Ids, end: int, start: int | None, dtype: DTypeLike = np.int64
) -> tuple[NDArray[Any], Ids]:
    """Put a start token before (None: nothing) and an end token behind each sequence; also where each one ends."""
    more = 1 if start is None else 2
    ends = (lengths + more).cumsum()
    framed = np.empty(int(ends[-1]), dtype)
    inner = np.ones(len(framed), bool)
    starts = ends - lengths - more
    framed[ends - 1], inner[ends - 1] = end, False
    if start is not None:
        framed[starts], inner[starts] = start, False
    framed[inner] = flat
    return framed, ends
