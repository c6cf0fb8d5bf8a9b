"""Tokenizers whose tokens are characters, bytes or words."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.tokenizers.base import FIRST, SMALL_TEXT, Tokenizer
from lmtrain.data.tokenizers.word_index import LONGEST_BYTES, WordIndex, cut_words
from lmtrain.errors import ArtefactError


class _Vocabulary(Tokenizer):
    """A list of tokens, whose ids follow the special tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.vocab_size = FIRST + len(self.tokens)
        "".join(self.tokens).encode()  # raises if a token is half a surrogate pair
        self.ids = {token: FIRST + position for position, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ArtefactError("the vocabulary names a token twice")

    def decode(self, ids: Sequence[int]) -> str:
        kept = (int(i) for i in ids if i >= FIRST or i == self.unk_id)
        return self.separator.join(self.tokens[i - FIRST] if i >= FIRST else "<unk>" for i in kept)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


class CharTokenizer(_Vocabulary):
    """Each Unicode character is a token."""

    kind = "char"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        if any(len(token) != 1 for token in self.tokens):
            raise ArtefactError("a character vocabulary holds single characters only")
        self._id_of = np.full(0x110000, self.unk_id, np.int64)  # by code point: no loop over characters
        self._id_of[[ord(token) for token in self.tokens]] = list(self.ids.values())

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._id_of[points], np.array([len(text) for text in texts], np.int64)


class ByteTokenizer(Tokenizer):
    """Each of the 256 bytes of UTF-8 is a token; no text has an unknown one."""

    kind = "byte"
    vocab_size = FIRST + 256
    unk_id = None

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        encoded = [text.encode() for text in texts]
        flat = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64) + FIRST
        return flat, np.array([len(text) for text in encoded], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - FIRST for i in ids if i >= FIRST).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {}


class WordTokenizer(_Vocabulary):
    """Each word between white space is a token; a word that is not in the vocabulary is `<unk>`."""

    kind = "word"
    separator = " "

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self._index: WordIndex | None = None  # made for the first long text

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        whole = "\n".join(texts)
        if len(whole) < SMALL_TEXT or whole.count("\n") >= len(texts):
            return self._encode_slowly(texts)
        if self._index is None:
            self._index = WordIndex(self.tokens)
        words = cut_words(whole)
        flat = self._index.look_up(words).astype(np.int64) + (FIRST - 1)  # an unknown word, 0, becomes 3: <unk>
        for position in np.flatnonzero(words.sizes > LONGEST_BYTES).tolist():
            [word] = words.bytes_of(np.array([position]))
            flat[position] = self.ids.get(word.decode("utf-8", "surrogatepass"), 3)
        return flat, words.lengths()

    def _encode_slowly(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        words = [text.split() for text in texts]
        flat = [self.ids.get(word, 3) for word in chain.from_iterable(words)]
        return np.array(flat, np.int64), np.array([len(part) for part in words], np.int64)
