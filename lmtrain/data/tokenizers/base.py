"""The base class of tokenizers, which turn text into ids and back.

Special tokens are `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3; a vocabulary's own tokens follow from 4 on. Kind `ids`
leaves the user's ids as they are and appends `<bos>` and `<eos>`. Text that looks like a special token is ordinary
text, with one exception: for kind `word` a literal `<unk>` is the unknown word, as in the published corpora.

Shapes: S texts, T tokens of all of them.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.text.normalise import normalise

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
FIRST = len(SPECIAL_TOKENS)  # the id of a vocabulary's first own token
TOKENIZER_FORMAT = 1
LARGEST_VOCABULARY = 1 << 24
SMALL_TEXT = 1 << 14  # characters of a text that is faster encoded word by word


class Measured(NamedTuple):
    """Encoded texts, and how much text their tokens can give back, for bits per character and per byte.

    White space that is folded and what unknown tokens stand for can't be given back, and is not counted.
    """

    flat: Ints  # (T,) ids
    lengths: Ints  # (S,) ids of each text
    characters: int
    bytes: int  # of UTF-8


class Tokenizer(ABC):
    """One way to turn text into ids. On known text, `decode` undoes `encode_texts`."""

    kind: ClassVar[str]
    separator: ClassVar[str] = ""  # stands between two tokens in a text
    vocab_size: int
    pad_id, bos_id, eos_id = 0, 1, 2
    unk_id: int | None = 3
    lowercase: bool = False  # whether upper case is turned into lower case first

    def encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Encode texts in NFC: the flat ids of all of them (T,), and the number of ids of each (S,)."""
        return self._encode_texts(self.lowered(texts))

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Encode texts that are in lower case where the tokenizer wants that."""

    def encode_measured(self, texts: Sequence[str]) -> Measured:
        """Encode texts, and count the characters and bytes that their tokens can give back."""
        texts = self.lowered(texts)
        flat, lengths = self._encode_texts(texts)
        whole = "".join(texts)
        return Measured(flat, lengths, len(whole), len(whole if whole.isascii() else whole.encode()))

    def lowered(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts in lower case if the tokenizer wants that."""
        return [normalise(text.lower()) for text in texts] if self.lowercase else texts

    def unknown_parts(self, texts: Sequence[str]) -> Counter[str]:
        """Count the words of some texts that hold an unknown token; characters, where tokens are not words."""
        if self.unk_id is None:
            return Counter()
        counts = Counter(" ".join(texts).split() if self.separator else "".join(texts))
        parts = list(counts)
        flat, lengths = self.encode_texts(parts)
        owners = np.repeat(np.arange(len(parts)), lengths)
        unknown = set(owners[flat == self.unk_id].tolist())
        return Counter({part: counts[part] for number, part in enumerate(parts) if number in unknown})

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. `<pad>`, `<bos>` and `<eos>` give no text, `<unk>` gives `<unk>`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the content of a run's tokenizer.json beside the kind and the format."""

    def may_change(self, token: int) -> bool:
        """Tell whether the whole text of a token may still change once the next token is known."""
        return False

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without `<bos>` and `<eos>`."""
        return [int(i) for i in self.encode_texts([text])[0]]

    def dumps(self) -> str:
        """Return the whole tokenizer as JSON, which `parse_tokenizer` reads."""
        content = {"format": TOKENIZER_FORMAT, "kind": self.kind, **self.state()}
        return json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n"

    def fingerprint(self) -> str:
        """SHA-256 of the content. Tokenizers with equal content have equal fingerprints."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()
