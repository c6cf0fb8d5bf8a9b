"""Tokenizers of the `tokenizers` library: byte pair encoding, unigram, or a tokenizer.json of the user's own."""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lmtrain.data.arrays import Ints
from lmtrain.data.tokenizers.base import FIRST, SMALL_TEXT, Tokenizer
from lmtrain.data.tokenizers.library import as_artefact_errors
from lmtrain.data.tokenizers.pieces import Pieces, cuts_at_spaces
from lmtrain.errors import ArtefactError


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library (bpe, unigram, or a tokenizer.json of the user's).

    The library's ids are shifted to follow the special tokens. Its own special tokens are left out, so that no text
    can stand for one.

    Raises:
        ArtefactError: the content is not the library's JSON, or its ids have gaps.
    """

    def __init__(
        self, content: str, kind: str = "file", name: str = "tokenizer.json", *, lowercase: bool = False
    ) -> None:
        from tokenizers import Tokenizer as Library

        self.name, self.lowercase = name, lowercase
        self.kind = kind  # type: ignore[misc]  # bpe, unigram and file differ only in their origin
        with as_artefact_errors(f"{name}: not a tokenizer of the tokenizers library"):
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
        if unknown_id is None:  # unigram gives its id instead
            unknown_id = json.loads(self.library.to_str())["model"].get("unk_id")
        self.unk_id = None if unknown_id is None else FIRST + unknown_id
        by_spaces = cuts_at_spaces(json.loads(self.library.to_str()))
        self._pieces = Pieces(self._encode, list(map(len, tokens))) if by_spaces else None  # a character is a byte

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        with as_artefact_errors(f"{self.name}: can't encode this text"):
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
        with as_artefact_errors(f"{self.name}: can't decode these tokens"):
            text: str = self.library.decode([int(i) - FIRST for i in ids if i >= FIRST], skip_special_tokens=False)
        return text

    def may_change(self, token: int) -> bool:
        # the library's ByteFallback decoder takes a run of byte tokens for text only if all its bytes together are text
        name = self.library.id_to_token(token - FIRST) if token >= FIRST else None
        return re.fullmatch("<0x[0-9A-F]{2}>", name or "") is not None

    def state(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self.library.to_str()), **({"lowercase": True} if self.lowercase else {})}
