"""The counted n-grams of a run: made of its training text, kept in a file, held against the run's checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.store.token_store import TokenStore
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError, ConfigError
from lmtrain.model.ngrams.counts import LARGEST_TOKENS, PARTS, count_ngrams
from lmtrain.runs.checkpoint import read_header, tensors_in
from lmtrain.system.files import LARGEST_JSON_BYTES, hash_of, open_regular, read_bytes

COUNTS_FILE = "ngram_counts.safetensors"


def refuse_large(config: Config, store: TokenStore) -> None:
    """Raises ConfigError where n-grams are to be counted of a text too large for it."""
    if config.model.ngram_counts is not None and len(store.tokens) > LARGEST_TOKENS:
        raise ConfigError(
            f"model.ngram_counts: {len(store.tokens):,} tokens are too many to count in memory (at most "
            f"{LARGEST_TOKENS:,}); set model.ngram_counts: null"
        )


def count_text(config: Config, store: TokenStore, tokenizer: Tokenizer) -> dict[str, Tensor] | None:
    """The n-grams of each direction in which the model reads, as `LanguageModel.load_counts` takes them.

    The same text gives the same counts. Returns None where the configuration asks for none.
    """
    order = config.model.ngram_counts
    if order is None:
        return None
    tokens, place = _laid_out(store, tokenizer.eos_id, backward=False)
    found = {"forward": count_ngrams(tokens, place, order, tokenizer.vocab_size)}
    if config.model.bidirectional:
        found["backward"] = count_ngrams(
            *_laid_out(store, tokenizer.eos_id, backward=True), order, tokenizer.vocab_size
        )
    return {f"of_{direction}.{name}": part for direction, own in found.items() for name, part in own.items()}


def _laid_out(store: TokenStore, eos_id: int, backward: bool) -> tuple[Tensor, Tensor]:
    """All tokens in the order in which a direction reads them, and how many of its sequence stand before each."""
    tokens: NDArray[np.int64] = np.asarray(store.tokens).astype(np.int64)
    if store.counts.stream:  # one text, that begins behind an end
        tokens = np.concatenate([[eos_id], tokens])
        return torch.from_numpy(tokens), torch.arange(len(tokens))
    offsets = np.asarray(store.offsets).astype(np.int64)
    lengths = np.diff(offsets)
    place = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    if backward:
        tokens = tokens[np.repeat(offsets[1:], lengths) - 1 - place]
    return torch.from_numpy(tokens), torch.from_numpy(place)


def dump_counts(counts: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file."""
    import safetensors.torch

    data: bytes = safetensors.torch.save(dict(counts))
    return data


def read_counts(path: Path, digest: object, config: Config, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The counts of a run.

    Args:
        digest: SHA-256 of the file, as a checkpoint of the run has it.

    Raises:
        ArtefactError: missing, damaged, or not counts of this model.
    """
    directions = ("forward", "backward") if config.model.bidirectional else ("forward",)
    orders = range(1, (config.model.ngram_counts or 0) + 1)
    names = [f"of_{direction}.{order}" for direction in directions for order in orders]
    counts = tensors_in(path, _bytes(path, digest, names, tokenizer.vocab_size))
    for name in names:
        contexts, pairs, own = (counts[f"{name}.{part}"] for part in PARTS)
        if not _sound(contexts, pairs, own, tokenizer.vocab_size):
            raise _odd(path, name, tokenizer.vocab_size)
    return counts


def _bytes(path: Path, digest: object, names: Sequence[str], vocab_size: int) -> bytes:
    """The file, once its header says that it holds counts, and no more of them than there could be."""
    with open_regular(path) as handle:
        kinds = read_header(path, handle, os.fstat(handle.fileno()).st_size)
    if kinds.keys() != {f"{name}.{part}" for name in names for part in PARTS}:
        raise ArtefactError(f"{path}: not the counts of this model")
    most = LARGEST_JSON_BYTES
    for name in names:
        contexts, pairs, own = (kinds[f"{name}.{part}"] for part in PARTS)
        shapes = contexts.shape + pairs.shape + own.shape
        types = (contexts.dtype, pairs.dtype, own.dtype) == ("I64", "I64", "I32")
        one_dimension = len(contexts.shape) == len(pairs.shape) == len(own.shape) == 1
        if not (types and one_dimension and 0 < shapes[0] <= shapes[1] == shapes[2] <= LARGEST_TOKENS):
            raise _odd(path, name, vocab_size)
        most += 8 * shapes[0] + 12 * shapes[1]
    data = read_bytes(path, most)
    if hash_of(data) != digest:
        raise ArtefactError(f"{path}: damaged: not the counts that the model was trained with")
    return data


def _odd(path: Path, name: str, vocab_size: int) -> ArtefactError:
    return ArtefactError(f"{path}: {name}: not counts of a vocabulary of {vocab_size:,}")


def _sound(contexts: Tensor, pairs: Tensor, counts: Tensor, vocab_size: int) -> bool:
    """Whether these can be looked up in: ascending keys, places that there are, counts of one and more."""
    # compared, for the difference of two keys may be too large for 64 bits
    ascending = all(bool((part[1:] > part[:-1]).all()) for part in (contexts, pairs))
    return ascending and int(pairs[0]) >= 0 and int(pairs[-1]) < len(contexts) * vocab_size and int(counts.min()) > 0
