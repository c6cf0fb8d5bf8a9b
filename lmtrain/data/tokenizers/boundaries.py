"""Words and marks: text is cut at Unicode's word boundaries, and put together again without loss.

A token is a piece of text together with the space before it: ` the`, `,`, ` (`, `x`. So what stands together comes back
together, and what stands apart comes back with one space. The boundaries are those of Unicode Standard Annex #29
(https://unicode.org/reports/tr29/#Word_Boundaries), which keep contractions, decimal numbers and emoji sequences whole.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.tokenizers.base import FIRST, Measured
from lmtrain.data.tokenizers.pieces import Pieces
from lmtrain.data.tokenizers.vocabulary import Vocabulary
from lmtrain.data.tokenizers.word_index import LINE_BREAK, SPACE

MOST_KNOWN = 1 << 18  # chunks of text whose pieces are remembered
_UNKNOWN = "<unk>"  # a word of the text that is the unknown word, as in the published corpora


class Splitter:
    """Cuts what stands between white space into tokens, each distinct chunk once."""

    def __init__(self) -> None:
        from tokenizers import Regex, pre_tokenizers

        self._split: Any = pre_tokenizers.Split(Regex(r"(?y{w})\X"), "isolated")  # Oniguruma: one segment of words
        self._known: dict[str, list[str]] = {LINE_BREAK: ["\n"], _UNKNOWN: [f" {_UNKNOWN}"]}

    def tokens_of(self, chunk: str) -> list[str]:
        """Return the tokens of a chunk that follows white space; `LINE_BREAK` gives a line break."""
        if (tokens := self._known.get(chunk)) is None:
            first, *others = (piece for piece, _ in self._split.pre_tokenize_str(chunk))
            tokens = [f" {first}", *others]
            if len(self._known) < MOST_KNOWN:
                self._known[chunk] = tokens
        return tokens

    def spread(self, texts: Iterable[str]) -> list[str]:
        """Return texts whose words are the tokens of these texts, for counting; see `to_token`."""
        chunks = (chunk for text in texts for chunk in fold(text).split())
        return [" ".join([_as_word(token) for token in self.tokens_of(chunk)]) for chunk in chunks]


def _as_word(token: str) -> str:
    return LINE_BREAK if token == "\n" else f"{SPACE}{token[1:]}" if token[0] == " " else token


def to_token(word: str) -> str:
    """Return the token that a counted word stands for: `SPACE` and `LINE_BREAK` are what they stand in for."""
    return word.replace(SPACE, " ").replace(LINE_BREAK, "\n")


def mark_breaks(text: str) -> str:
    """Return a text with `LINE_BREAK`, as a word, in place of each line break."""
    return text.replace("\n", f" {LINE_BREAK} ")


def fold(text: str) -> str:
    """Return a text with one space before each word and each line break, which `LINE_BREAK` stands for."""
    words = mark_breaks(text).split()
    return f" {' '.join(words)}" if words else ""


class BoundaryTokenizer(Vocabulary):
    """Words and marks at Unicode's word boundaries; a piece that is not in the vocabulary is `<unk>`.

    Decoding gives the text back with its white space folded: one space between words, line breaks as they are.
    """

    kind = "word"
    separator = " "

    def __init__(self, tokens: Sequence[str], lowercase: bool = False) -> None:
        super().__init__(tokens, lowercase)
        self._splitter = Splitter()
        self._pieces = Pieces(lambda pieces: list(map(self._ids_of, pieces)), None)
        shown = ["", "", "", "", *self.tokens]
        self._characters = np.array(list(map(len, shown)), np.int64)
        self._bytes = np.array([len(token.encode()) for token in shown], np.int64)
        self._is_spaced = np.array([token.startswith(" ") for token in shown])

    def decode(self, ids: Sequence[int]) -> str:
        kept = (int(i) for i in ids if i >= FIRST or i == self.unk_id)
        text = "".join(self.tokens[i - FIRST] if i >= FIRST else f" {_UNKNOWN}" for i in kept)
        return text.removeprefix(" ").replace("\n ", "\n")

    def state(self) -> dict[str, Any]:
        return {"split": "words", **super().state()}

    def unknown_parts(self, texts: Sequence[str]) -> Counter[str]:
        """Count the words and marks of some texts that the vocabulary lacks; a space before one is left out."""
        chunks = (chunk for text in self.lowered(texts) for chunk in fold(text).split())
        tokens = (token for chunk in chunks for token in self._splitter.tokens_of(chunk))
        return Counter(token.removeprefix(" ") for token in tokens if token not in self.ids and token != "\n")

    def _ids_of(self, piece: str) -> list[int]:
        return [self.ids.get(token, 3) for token in self._splitter.tokens_of(piece[1:])] if piece else []

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        if "\n" not in self.ids:  # then a line break is white space
            texts = [text.replace("\n", " ") for text in texts]
        return self._pieces.encode_texts(list(map(fold, texts)))

    def encode_measured(self, texts: Sequence[str]) -> Measured:
        flat, lengths = self.encode_texts(texts)
        left_out = np.zeros(len(flat), bool)  # the space of the first token of a line
        left_out[(lengths.cumsum() - lengths)[lengths > 0]] = True
        if (break_id := self.ids.get("\n")) is not None:
            left_out[1:] |= flat[:-1] == break_id
        spaces = int((left_out & self._is_spaced[flat]).sum())
        return Measured(
            flat, lengths, int(self._characters[flat].sum()) - spaces, int(self._bytes[flat].sum()) - spaces
        )
