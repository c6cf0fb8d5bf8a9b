"""The tokenizers library: its faults as ours, its trainers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from lmtrain.errors import ArtefactError

_REDIRECTING = Lock()  # file 2 is the whole process's


@contextmanager
def caught(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises, as an ArtefactError.

    Its panics are no `Exception`, and it tells them to file 2 by itself: a user should have one line, and ours.
    """
    with _REDIRECTING, open(os.devnull, "w") as unseen:
        try:
            shown = os.dup(2)
        except OSError:  # closed by whoever started us
            shown = os.dup(unseen.fileno())
        os.dup2(unseen.fileno(), 2)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # noqa: BLE001
            raise ArtefactError(f"{what}: {first_line(error)}") from None
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def train_library(kind: str, texts: Iterable[str], size: int) -> str:
    """The JSON of a tokenizer of byte-level pieces: any text can be encoded and comes back as it was, so nothing is
    unknown."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trainer: Any
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bpe":
        library = Library(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    else:
        library = Library(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(texts, trainer)
    return str(library.to_str())


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
