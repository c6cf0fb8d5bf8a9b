"""Text to ids and back.

Special tokens are `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3; a vocabulary's own tokens follow from 4 on. Kind `ids`
leaves the user's ids as they are and appends `<bos>` and `<eos>`. Text that looks like a special token is ordinary
text; for kind `word` alone a literal `<unk>` is the unknown word, as in the published corpora.

Encoders take many texts at once and give flat ids with the length of each text: (T,) int64 and (texts,) int64.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
FIRST = len(SPECIAL_TOKENS)  # the id of a vocabulary's first own token
TOKENIZER_FORMAT = 1
LARGEST_VOCABULARY = 1 << 24
SMALL_TEXT = 1 << 14  # characters that are sooner looked up word by word

Ids = NDArray[np.int64]


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
        content = {"format": TOKENIZER_FORMAT, "kind": self.kind, **self.state()}
        return json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n"

    def fingerprint(self) -> str:
        """SHA-256 of the content: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()
