"""The counted n-grams of a run: counts the training text, and writes, checks and reads the file of counts.

Shapes: T tokens of the training text; C contexts and J pairs (context, next token) of one order.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.batches.streams import Stream
from lmtrain.data.store.token_store import TokenStore
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError, ConfigError
from lmtrain.model.ngrams.counting import LARGEST_TOKENS, PARTS, count_ngrams
from lmtrain.runs.tensor_file import parse_tensors, read_header
from lmtrain.system.console import Notify
from lmtrain.system.files import LARGEST_JSON_BYTES, hash_of, open_regular, read_bytes, write_atomically

COUNTS_FILE = "ngram_counts.safetensors"
LEAST_COLUMNS = 8  # of a stream: of fewer, what all but one have counted is not enough to learn from


def check_countable(config: Config, tokens: int, about: str = "") -> None:
    """Raise ConfigError if the configuration asks for n-gram counts of a text that is too large to count.

    Args:
        tokens: tokens of the training text, start and end tokens included.
        about: what the message says before an estimate.
    """
    if config.model.ngram_counts is not None and tokens > LARGEST_TOKENS:
        raise ConfigError(
            f"model.ngram_counts: {about}{tokens:,} tokens are too many to count in memory (at most "
            f"{LARGEST_TOKENS:,}); set model.ngram_counts: null"
        )


def read_or_count(
    run: Path, digest: object, config: Config, store: TokenStore, tokenizer: Tokenizer, notify: Notify
) -> tuple[dict[str, Tensor], str]:
    """Read the counts of a run, or count its text and write the file if there is none that can be used.

    Args:
        digest: the file's SHA-256, from a checkpoint; None for a run without a checkpoint.
        notify: is called with a line if the text is counted.

    Returns:
        What `count_text` returns, and the SHA-256 of the file.

    Raises:
        ArtefactError: the file is missing or damaged, and the file that would be written is another one.
    """
    path, fault = run / COUNTS_FILE, ""
    if digest is not None:
        try:
            return read_counts(path, digest, config, tokenizer), str(digest)
        except ArtefactError as error:
            fault = f"{error}; "
    notify(f"{fault}counting n-grams of up to {config.model.ngram_counts} tokens")
    counts = count_text(config, store, tokenizer)
    data = dump_counts(counts)
    written = hash_of(data)
    if digest not in (None, written):
        raise ArtefactError(f"{fault}this lmtrain would write another one; put the file back, or train a new run")
    write_atomically(path, data)
    return counts, written


def count_text(
    config: Config, store: TokenStore, tokenizer: Tokenizer, most_tokens: int | None = None, columns: int | None = None
) -> dict[str, Tensor]:
    """Count the n-grams of the training text, in each direction in which the model reads it.

    The same text always gives the same counts. A sequence is counted as a whole, also where training cuts it into rows
    of `batching.max_length` tokens. A row begins without history, so the first events after a cut are predicted from
    shorter n-grams, all of which were counted with these events.

    Args:
        most_tokens: count only the first sequences, of about this many tokens; None: all.
        columns: of a stream, in which it is trained: return what each one alone has counted, see `count_ngrams`.

    Returns:
        What `LanguageModel.load_counts` takes, as its first or, with `columns`, its second argument: for example
        `of_forward.2.contexts` (C,) int64, `of_forward.2.pairs` (J,) int64 and `of_forward.2.counts` (J,) int32.
    """
    order = config.model.ngram_counts
    assert order is not None
    directions = ("forward", "backward") if config.model.bidirectional else ("forward",)
    counts = {}
    for direction in directions:
        backward = direction == "backward"
        tokens, positions = _in_reading_order(store, tokenizer.eos_id, backward, most_tokens)
        column = None
        if columns is not None:  # the end token before the text is no event, so its column does not matter
            lengths = Stream(tokens[1:].numpy(), tokenizer.eos_id, columns).column_lengths
            column = torch.from_numpy(np.concatenate([[0], np.repeat(np.arange(columns), lengths)]))
        for name, part in count_ngrams(tokens, positions, order, tokenizer.vocab_size, column).items():
            counts[f"of_{direction}.{name}"] = part
    return counts


def count_columns(
    config: Config, store: TokenStore, tokenizer: Tokenizer, columns: int | None, most_tokens: int | None = None
) -> dict[str, Tensor]:
    """Return what each column of a stream alone has counted, for training; nothing if there are too few columns.

    Args:
        columns: their number; None: the text is no stream.
        most_tokens: as for `count_text`.
    """
    if columns is None or columns < LEAST_COLUMNS:
        return {}
    return count_text(config, store, tokenizer, most_tokens, columns)


def _in_reading_order(store: TokenStore, eos_id: int, backward: bool, most_tokens: int | None) -> tuple[Tensor, Tensor]:
    """Return tokens (T,) in the order in which one direction reads them, and the position (T,) of each in its
    sequence, counted from 0 in that direction: those of the first sequences, with about `most_tokens`, or all."""
    if store.counts.stream:  # a stream is one sequence, and its first token is predicted from an end token
        tokens = np.concatenate([[eos_id], np.asarray(store.tokens[:most_tokens]).astype(np.int64)])
        return torch.from_numpy(tokens), torch.arange(len(tokens))
    offsets = np.asarray(store.offsets).astype(np.int64)
    if most_tokens is not None:
        offsets = offsets[: max(2, np.searchsorted(offsets, most_tokens, "right"))]
    tokens = np.asarray(store.tokens[: offsets[-1]]).astype(np.int64)
    lengths = np.diff(offsets)
    positions = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    if backward:
        tokens = tokens[np.repeat(offsets[1:], lengths) - 1 - positions]
    return torch.from_numpy(tokens), torch.from_numpy(positions)


def dump_counts(counts: Mapping[str, Tensor]) -> bytes:
    """Return the content of the file for these counts."""
    import safetensors.torch

    return bytes(safetensors.torch.save(dict(counts)))


def read_counts(path: Path, digest: object, config: Config, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Read the counts of a run, as `count_text` returned them; `digest` is the file's SHA-256, from a checkpoint.

    Raises:
        ArtefactError: the file is missing or damaged, or holds the counts of another model.
    """
    directions = ("forward", "backward") if config.model.bidirectional else ("forward",)
    orders = range(1, (config.model.ngram_counts or 0) + 1)
    names = [f"of_{direction}.{order}" for direction in directions for order in orders]
    counts = parse_tensors(path, _read_checked(path, digest, names, tokenizer.vocab_size))
    for name in names:
        contexts, pairs, occurrences = (counts[f"{name}.{part}"] for part in PARTS)
        if not _is_searchable(contexts, pairs, occurrences, tokenizer.vocab_size):
            raise _wrong_counts(path, name, tokenizer.vocab_size)
    return counts


def _read_checked(path: Path, digest: object, names: Sequence[str], vocab_size: int) -> bytes:
    """Read the file, after checking that its header names these counts and no more of them than a text can have."""
    with open_regular(path) as handle:
        specs = read_header(path, handle, os.fstat(handle.fileno()).st_size)
    if specs.keys() != {f"{name}.{part}" for name in names for part in PARTS}:
        raise ArtefactError(f"{path}: not the counts of this model")
    largest = LARGEST_JSON_BYTES
    for name in names:
        contexts, pairs, counts = (specs[f"{name}.{part}"] for part in PARTS)
        shapes = contexts.shape + pairs.shape + counts.shape
        types = (contexts.dtype, pairs.dtype, counts.dtype) == ("I64", "I64", "I32")
        one_dimension = len(contexts.shape) == len(pairs.shape) == len(counts.shape) == 1
        if not (types and one_dimension and 0 < shapes[0] <= shapes[1] == shapes[2] <= LARGEST_TOKENS):
            raise _wrong_counts(path, name, vocab_size)
        largest += 8 * shapes[0] + 12 * shapes[1]
    data = read_bytes(path, largest)
    if hash_of(data) != digest:
        raise ArtefactError(f"{path}: damaged: not the counts that the model was trained with")
    return data


def _wrong_counts(path: Path, name: str, vocab_size: int) -> ArtefactError:
    return ArtefactError(f"{path}: {name}: not counts of a vocabulary of {vocab_size:,} tokens")


def _is_searchable(contexts: Tensor, pairs: Tensor, counts: Tensor, vocab_size: int) -> bool:
    """Tell whether counts can be looked up: contexts (C,) and pairs (J,) ascend, each pair belongs to one of the
    contexts, and counts (J,) are positive."""
    # neighbours are compared, not subtracted: the difference of two keys may exceed 64 bits
    ascending = all(bool((part[1:] > part[:-1]).all()) for part in (contexts, pairs))
    return ascending and int(pairs[0]) >= 0 and int(pairs[-1]) < len(contexts) * vocab_size and int(counts.min()) > 0
