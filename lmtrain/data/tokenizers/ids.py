"""The tokenizer of text that consists of ids already."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import DataError


class IdsTokenizer(Tokenizer):
    """Reads text that consists of ids: integers from 0 to ids - 1 between white space, without the pad id.

    Args:
        ids: the number of ids, the pad id included; `<bos>` is `ids` and `<eos>` is `ids + 1`.
        pad_id: the id that never occurs in a text.
    """

    kind = "ids"
    separator = " "
    unk_id = None

    def __init__(self, ids: int, pad_id: int) -> None:
        self.ids, self.pad_id = ids, pad_id
        self.bos_id, self.eos_id, self.vocab_size = ids, ids + 1, ids + 2

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        words = [text.split() for text in texts]
        flat = np.fromiter(map(self._id, chain.from_iterable(words)), np.int64)
        return flat, np.array([len(part) for part in words], np.int64)

    def _id(self, word: str) -> int:
        digits = word.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise DataError(f"{word[:40]!r} is not an id; kind ids reads whole numbers between white space")
        if word != digits or len(digits) > 18 or int(digits) >= self.ids:
            raise DataError(
                f"id {word[:40]} is not in 0..{self.ids - 1}; raise tokenizer.vocab_size if it belongs there"
            )
        if int(digits) == self.pad_id:
            raise DataError(f"id {digits} is the pad id; set tokenizer.pad_id to an id that never occurs")
        return int(digits)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids if i < self.ids and i != self.pad_id)

    def state(self) -> dict[str, Any]:
        return {"ids": self.ids, "pad_id": self.pad_id}
