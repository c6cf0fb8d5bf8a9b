"""Text to ids and back.

Special tokens are `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3; a vocabulary's own tokens follow from 4 on. Kind `ids`
leaves the user's ids as they are and appends `<bos>` and `<eos>`. Text that looks like a special token is ordinary
text; for kind `word` alone a literal `<unk>` is the unknown word, as in the published corpora.

Encoders take many texts at once and give flat ids with the length of each text: (T,) int64 and (texts,) int64.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.tokens.library import caught, first_line, train_library
from lmtrain.data.tokens.pieces import Pieces, cuts_at_spaces
from lmtrain.data.tokens.words import LONGEST_BYTES, WordIndex, cut
from lmtrain.errors import ArtefactError, DataError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
FIRST = len(SPECIAL_TOKENS)  # the id of a vocabulary's first own token
FORMAT = 1
LARGEST_VOCABULARY = 1 << 24
SMALL_TEXT = 1 << 14  # characters that are sooner looked up word by word

Ids = NDArray[np.int64]


def normalise(text: str) -> str:
    """NFC, so that a letter has one spelling whether it was typed composed or not (Hangul, accents)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Tokenizer(ABC):
    """One way to cut text into ids. `encode_texts` and `decode` are each other's inverse on known text."""

    kind: ClassVar[str]
    separator: ClassVar[str] = ""  # what stands between two tokens in text
    vocab_size: int
    pad_id, bos_id, eos_id = 0, 1, 2
    unk_id: int | None = 3

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Flat ids (T,) of all texts, and the number of ids of each (texts,)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `<pad>`, `<bos>` and `<eos>` give nothing, `<unk>` gives `<unk>`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a run's tokenizer.json holds beside kind and format."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without `<bos>` and `<eos>`."""
        return [int(i) for i in self.encode_texts([text])[0]]

    def dumps(self) -> str:
        """The whole tokenizer as JSON, as `loads` reads it."""
        content = {"format": FORMAT, "kind": self.kind, **self.state()}
        return json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n"

    def fingerprint(self) -> str:
        """SHA-256 of the content: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()


class _Vocabulary(Tokenizer):
    """A list of tokens, the id of each being its place behind the special ones."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.vocab_size = FIRST + len(self.tokens)
        "".join(self.tokens).encode()  # lone surrogates are no text
        self.ids = {token: FIRST + place for place, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ArtefactError("the vocabulary names a token twice")

    def decode(self, ids: Sequence[int]) -> str:
        kept = (int(i) for i in ids if i >= FIRST or i == self.unk_id)
        return self.separator.join(self.tokens[i - FIRST] if i >= FIRST else "<unk>" for i in kept)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


class CharTokenizer(_Vocabulary):
    """A token a Unicode character."""

    kind = "char"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        if any(len(token) != 1 for token in self.tokens):
            raise ArtefactError("a character vocabulary holds single characters only")
        self._id_of = np.full(0x110000, self.unk_id, np.int64)  # by code point: no loop over characters
        self._id_of[[ord(token) for token in self.tokens]] = list(self.ids.values())

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._id_of[points], np.array([len(text) for text in texts], np.int64)


class ByteTokenizer(Tokenizer):
    """A token a UTF-8 byte: 256 of them, nothing is unknown."""

    kind = "byte"
    vocab_size = FIRST + 256
    unk_id = None

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        encoded = [text.encode() for text in texts]
        flat = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64) + FIRST
        return flat, np.array([len(text) for text in encoded], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - FIRST for i in ids if i >= FIRST).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {}


class WordTokenizer(_Vocabulary):
    """A token a word between white space; what is not in the vocabulary is `<unk>`."""

    kind = "word"
    separator = " "

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self._index: WordIndex | None = None  # made for the first long text

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        whole = "\n".join(texts)
        if len(whole) < SMALL_TEXT or whole.count("\n") >= len(texts):
            return self._encode_slowly(texts)
        if self._index is None:
            self._index = WordIndex(self.tokens)
        words = cut(whole)
        flat = self._index.find(words).astype(np.int64) + (FIRST - 1)  # 0, not found, is FIRST - 1: <unk>
        for place in np.flatnonzero(words.sizes > LONGEST_BYTES).tolist():
            [word] = words.bytes_of(np.array([place]))
            flat[place] = self.ids.get(word.decode("utf-8", "surrogatepass"), 3)
        return flat, words.lengths()

    def _encode_slowly(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        words = [text.split() for text in texts]
        flat = [self.ids.get(word, 3) for word in chain.from_iterable(words)]
        return np.array(flat, np.int64), np.array([len(part) for part in words], np.int64)


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library (bpe, unigram, or a tokenizer.json of the user's).

    The library's ids are shifted behind the special tokens, and its own special tokens are left out, so that no text
    can stand for one.

    Raises:
        ArtefactError: the JSON is not a tokenizer's, or its ids have gaps.
    """

    def __init__(self, content: str, kind: str = "file", name: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer as Library

        self.name = name
        self.kind = kind  # type: ignore[misc]  # bpe, unigram and file differ in their origin alone
        with caught(f"{name}: not a tokenizer of the tokenizers library"):
            self.library = Library.from_str(content)
        self.library.no_padding()
        self.library.no_truncation()
        self.library.encode_special_tokens = True  # text that looks like a special token is text
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
            raise ArtefactError(f"{name}: the vocabulary's ids have gaps")
        self.vocab_size = FIRST + len(tokens)
        unknown = getattr(self.library.model, "unk_token", None)
        unknown_id = self.library.token_to_id(unknown) if isinstance(unknown, str) else None
        if unknown_id is None:  # unigram names it by its id
            unknown_id = json.loads(self.library.to_str())["model"].get("unk_id")
        self.unk_id = None if unknown_id is None else FIRST + unknown_id
        by_spaces = cuts_at_spaces(json.loads(self.library.to_str()))
        self._pieces = Pieces(self._encode, list(map(len, tokens))) if by_spaces else None  # a character is a byte

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        with caught(f"{self.name}: can't encode this text"):
            if self._pieces is not None and sum(map(len, texts)) >= SMALL_TEXT:
                flat, lengths = self._pieces.encode_texts(texts)
            else:
                encoded = self._encode(list(texts))
                lengths = np.array([len(ids) for ids in encoded], np.int64)
                flat = np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths.sum()))
        return flat + FIRST, lengths

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [part.ids for part in self.library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        with caught(f"{self.name}: can't decode these tokens"):
            text: str = self.library.decode([int(i) - FIRST for i in ids if i >= FIRST], skip_special_tokens=False)
        return text

    def state(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self.library.to_str())}


class IdsTokenizer(Tokenizer):
    """Text that is ids already: whitespace-separated integers in 0 .. ids - 1, the pad id excepted.

    Args:
        ids: how many ids there are, the pad id counted; `<bos>` is `ids` and `<eos>` is `ids + 1`.
    """

    kind = "ids"
    separator = " "
    unk_id = None

    def __init__(self, ids: int, pad_id: int) -> None:
        self.ids, self.pad_id = ids, pad_id
        self.bos_id, self.eos_id, self.vocab_size = ids, ids + 1, ids + 2

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
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


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 1,
    path: str | None = None,
    pad_id: int = 0,
) -> Tokenizer:
    """Make the tokenizer that a config's `tokenizer` section asks for, from the training texts.

    Args:
        texts: read only where the kind has something to learn.
        vocab_size: upper bound, special tokens counted; for kind ids the exact number of ids.

    Raises:
        DataError: nothing to learn a vocabulary from.
        ArtefactError: kind file, and the file is not a tokenizer.
    """
    match kind:
        case "byte":
            return ByteTokenizer()
        case "ids":
            return IdsTokenizer(vocab_size, pad_id)
        case "file":
            assert path is not None
            return SubwordTokenizer(Path(path).read_text(encoding="utf-8", errors="replace"), name=path)
        case "char":
            return CharTokenizer(_most_frequent(map(Counter, texts), vocab_size, min_frequency))
        case "word":
            words = (Counter(text.split()) for text in texts)
            return WordTokenizer(_most_frequent(words, vocab_size, min_frequency, left_out="<unk>"))
        case _:
            return SubwordTokenizer(train_library(kind, texts, max(257, vocab_size - FIRST)), kind)


def _most_frequent(
    counts: Iterator[Counter[str]], vocab_size: int, min_frequency: int, left_out: str | None = None
) -> list[str]:
    """The most frequent tokens first, equal counts in the order of their code points."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    if left_out is not None:
        total.pop(left_out, None)
    kept = sorted((item for item in total.items() if item[1] >= min_frequency), key=lambda item: (-item[1], item[0]))
    if not kept:
        raise no_vocabulary(min_frequency)
    return [token for token, _ in kept[: max(1, vocab_size - FIRST)]]


def no_vocabulary(min_frequency: int) -> DataError:
    """The error to raise where everything is rarer than that."""
    return DataError(f"no token occurs {min_frequency} times or more: there is no vocabulary to learn")


def loads(content: str, name: str = "tokenizer.json") -> Tokenizer:
    """Read what `Tokenizer.dumps` wrote.

    Raises:
        ArtefactError: not a tokenizer, or of a newer format.
    """
    try:
        stored = json.loads(content)
        if stored["format"] > FORMAT:
            raise ArtefactError(f"{name}: format {stored['format']} is newer than this lmtrain's; upgrade lmtrain")
        match stored["kind"]:
            case "byte":
                return ByteTokenizer()
            case "char" | "word" as kind:
                tokens = [str(token) for token in stored["tokens"]]
                try:
                    return CharTokenizer(tokens) if kind == "char" else WordTokenizer(tokens)
                except ArtefactError as error:
                    raise ArtefactError(f"{name}: {error}") from None
            case "ids":
                ids, pad_id = stored["ids"], stored["pad_id"]
                if type(ids) is not int or type(pad_id) is not int or not 0 <= pad_id < ids <= LARGEST_VOCABULARY:
                    raise ArtefactError(f"{name}: {str(ids)[:40]} ids with pad id {str(pad_id)[:40]}")
                return IdsTokenizer(ids, pad_id)
            case "bpe" | "unigram" | "file":
                return SubwordTokenizer(json.dumps(stored["tokenizer"]), stored["kind"], name)
            case kind:
                raise ArtefactError(f"{name}: unknown tokenizer kind {kind!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{name}: not a tokenizer file: {first_line(error)}") from None
