"""Reads the tokenizer that a run has stored."""

import json

from lmtrain.data.tokenizers.base import LARGEST_VOCABULARY, TOKENIZER_FORMAT, Tokenizer
from lmtrain.data.tokenizers.boundaries import BoundaryTokenizer
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.library import first_line
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer, CharTokenizer, WordTokenizer
from lmtrain.errors import ArtefactError


def parse_tokenizer(content: str, name: str = "tokenizer.json") -> Tokenizer:
    """Make the tokenizer that `Tokenizer.dumps` wrote; `name` is the file, for messages.

    Raises:
        ArtefactError: the content is not a tokenizer, or has a newer format.
    """
    try:
        stored = json.loads(content)
        if stored["format"] > TOKENIZER_FORMAT:
            raise ArtefactError(f"{name}: format {stored['format']} is newer than this lmtrain's; upgrade lmtrain")
        lowercase, split = stored.get("lowercase", False) is True, stored.get("split", "whitespace")
        match stored["kind"]:
            case "byte":
                return ByteTokenizer(lowercase)
            case "char" | "word" as kind:
                tokens = [str(token) for token in stored["tokens"]]
                if split not in ("whitespace", "words"):
                    raise ArtefactError(f"{name}: unknown split {str(split)[:40]!r}; upgrade lmtrain")
                try:
                    if kind == "char":
                        return CharTokenizer(tokens, lowercase)
                    return (BoundaryTokenizer if split == "words" else WordTokenizer)(tokens, lowercase)
                except ArtefactError as error:
                    raise ArtefactError(f"{name}: {error}") from None
            case "ids":
                ids, pad_id = stored["ids"], stored["pad_id"]
                if type(ids) is not int or type(pad_id) is not int or not 0 <= pad_id < ids <= LARGEST_VOCABULARY:
                    raise ArtefactError(f"{name}: {str(ids)[:40]} ids with pad id {str(pad_id)[:40]}")
                return IdsTokenizer(ids, pad_id)
            case "bpe" | "unigram" | "file":
                return SubwordTokenizer(json.dumps(stored["tokenizer"]), stored["kind"], name, lowercase=lowercase)
            case kind:
                raise ArtefactError(f"{name}: unknown tokenizer kind {kind!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{name}: not a tokenizer file: {first_line(error)}") from None
