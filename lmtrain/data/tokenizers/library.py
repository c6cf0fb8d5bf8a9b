"""Calls the trainers of the `tokenizers` library, and turns the library's errors into ours."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

from lmtrain.errors import ArtefactError

_REDIRECTING = Lock()  # all threads of the process have the same standard error
_panics_are_discarded = False


@contextmanager
def discard_panics() -> Iterator[None]:
    """Within this context, what the library writes to standard error when it panics is discarded.

    While the library works, nothing else in this process can write to standard error either. So only the command line
    does this, which shows one line for a fault.
    """
    global _panics_are_discarded
    _panics_are_discarded = True
    try:
        yield
    finally:
        _panics_are_discarded = False


@contextmanager
def as_artefact_errors(what: str) -> Iterator[None]:
    """Raise an ArtefactError for anything that the tokenizers library raises. Its message begins with `what`.

    The library's panics do not derive from `Exception`, and it writes them to standard error itself.
    """
    with _without_standard_error() if _panics_are_discarded else nullcontext():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # noqa: BLE001
            raise ArtefactError(f"{what}: {first_line(error)}") from None


@contextmanager
def _without_standard_error() -> Iterator[None]:
    with _REDIRECTING, open(os.devnull, "wb") as nowhere:
        try:
            standard_error = os.dup(2)
        except OSError:  # it was closed by whoever started this process
            standard_error = os.dup(nowhere.fileno())
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)


def train_library(kind: str, texts: Iterable[str], size: int) -> str:
    """Learn a tokenizer of byte-level pieces (bpe or unigram, of `size` at most), and return its JSON.

    It can encode any text and decodes it to the same text, so no token is unknown.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE() if kind == "bpe" else models.Unigram())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    make_trainer: Any = trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(texts, make_trainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return str(library.to_str())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut after 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
