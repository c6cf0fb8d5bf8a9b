"""Tokenizers whose tokens are characters, bytes or words between white space."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.tokenizers.base import FIRST, SMALL_TEXT, Measured, Tokenizer
from lmtrain.data.tokenizers.word_index import LINE_BREAK, LONGEST_BYTES, WordIndex, Words, cut_words
from lmtrain.errors import ArtefactError


class Vocabulary(Tokenizer):
    """A list of tokens, whose ids follow the special tokens."""

    def __init__(self, tokens: Sequence[str], lowercase: bool = False) -> None:
        self.tokens, self.lowercase = list(tokens), lowercase
        self.vocab_size = FIRST + len(self.tokens)
        "".join(self.tokens).encode()  # raises if a token is half a surrogate pair
        self.ids = {token: FIRST + position for position, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ArtefactError("the vocabulary names a token twice")

    def decode(self, ids: Sequence[int]) -> str:
        kept = (int(i) for i in ids if i >= FIRST or i == self.unk_id)
        return self.separator.join(self.tokens[i - FIRST] if i >= FIRST else "<unk>" for i in kept)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens, **({"lowercase": True} if self.lowercase else {})}


class CharTokenizer(Vocabulary):
    """Each Unicode character is a token."""

    kind = "char"

    def __init__(self, tokens: Sequence[str], lowercase: bool = False) -> None:
        super().__init__(tokens, lowercase)
        if any(len(token) != 1 for token in self.tokens):
            raise ArtefactError("a character vocabulary holds single characters only")
        self._id_of = np.full(0x110000, self.unk_id, np.int64)  # by code point: no loop over characters
        self._id_of[[ord(token) for token in self.tokens]] = list(self.ids.values())

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._id_of[points], np.array([len(text) for text in texts], np.int64)

    def encode_measured(self, texts: Sequence[str]) -> Measured:
        measured = super().encode_measured(texts)
        unknown = np.flatnonzero(measured.flat == self.unk_id)
        whole = "".join(self.lowered(texts)) if len(unknown) else ""
        size = sum(len(whole[place].encode()) for place in unknown.tolist())
        return measured._replace(characters=measured.characters - len(unknown), bytes=measured.bytes - size)


class ByteTokenizer(Tokenizer):
    """Each of the 256 bytes of UTF-8 is a token; no text has an unknown one."""

    kind = "byte"
    vocab_size = FIRST + 256
    unk_id = None

    def __init__(self, lowercase: bool = False) -> None:
        self.lowercase = lowercase

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        encoded = [text.encode() for text in texts]
        flat = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64) + FIRST
        return flat, np.array([len(text) for text in encoded], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - FIRST for i in ids if i >= FIRST).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {"lowercase": True} if self.lowercase else {}


class WordTokenizer(Vocabulary):
    """Each word between white space is a token; a word that is not in the vocabulary is `<unk>`.

    A line break within a text is a token of its own, `\\n`. A vocabulary without it takes it for white space.
    """

    kind = "word"
    separator = " "

    def __init__(self, tokens: Sequence[str], lowercase: bool = False) -> None:
        super().__init__(tokens, lowercase)
        self._index: WordIndex | None = None  # made for the first long text
        self._break_id = self.ids.get("\n")
        self._look_up = {LINE_BREAK if token == "\n" else token: id for token, id in self.ids.items()}

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text.replace(" \n", "\n").replace("\n ", "\n") if self._break_id is not None else text

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        flat, lengths, _ = self._encode_words(texts)
        return flat, lengths

    def _encode_words(self, texts: Sequence[str]) -> tuple[Ints, Ints, Words]:
        whole = "\n".join(texts)
        if whole.count("\n") >= len(texts):  # line breaks within texts
            instead = " " if self._break_id is None else f" {LINE_BREAK} "
            whole = "\n".join([text.replace("\n", instead) for text in texts])
        words = cut_words(whole)
        if len(whole) < SMALL_TEXT:
            found = words.bytes_of(np.arange(len(words.sizes)))
            flat = np.array([self._look_up.get(word.decode("utf-8", "surrogatepass"), 3) for word in found], np.int64)
            return flat, words.lengths() if texts else np.zeros(0, np.int64), words
        if self._index is None:
            self._index = WordIndex(list(self._look_up))
        flat = self._index.look_up(words).astype(np.int64) + (FIRST - 1)  # an unknown word, 0, becomes 3: <unk>
        long = np.flatnonzero(words.sizes > LONGEST_BYTES)
        flat[long] = [self._look_up.get(word.decode("utf-8", "surrogatepass"), 3) for word in words.bytes_of(long)]
        return flat, words.lengths(), words

    def encode_measured(self, texts: Sequence[str]) -> Measured:
        flat, lengths, words = self._encode_words(self.lowered(texts))
        known = np.flatnonzero(flat != self.unk_id)
        size = characters = int(words.sizes[known].sum())
        if len(known) and words.flat.max() > 127:  # the bytes that continue a character are no characters
            before = np.cumsum((words.flat & 0xC0) == 0x80)
            starts = words.starts[known]
            characters -= int((before[starts + words.sizes[known] - 1] - before[starts - 1]).sum())
        spaces = len(flat) - int(np.count_nonzero(lengths))  # between two words of a text
        if self._break_id is not None and (is_break := flat == self._break_id).any():
            within = np.ones(len(flat), bool)  # whether a token follows another of its text
            within[(lengths.cumsum() - lengths)[lengths > 0]] = False
            spaces -= int((within[1:] & (is_break[1:] | is_break[:-1])).sum())
            size -= (len(LINE_BREAK.encode()) - 1) * int(is_break.sum())
        return Measured(flat, lengths, characters + spaces, size + spaces)
