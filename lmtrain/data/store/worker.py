"""A process that works on blocks of a corpus: `python -m lmtrain.data.store.worker`, messages in and out.

The first message says what is to be done, each further one holds a block and is answered by what is made of it, or by
its fault; one without a block is answered by what is left. When nothing more comes in, for instance because the parent
was killed, the worker ends.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any, Protocol

from lmtrain.data.store.encoding import BlockEncoder, BlockResult
from lmtrain.data.store.messages import receive, send
from lmtrain.data.text.reading import RawBlock
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.counting import BlockCounter
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.errors import ArtefactError, DataError


class BlockTask(Protocol):
    """What is done with blocks."""

    def answer(self, raw: RawBlock) -> BlockResult: ...

    def rest(self) -> BlockResult: ...


def task_of(header: dict[str, Any], parts: list[bytes]) -> BlockTask:
    """What a first message asks for: to encode with this tokenizer, or to count tokens of a kind."""
    source = Source(**{**header["source"], "files": tuple(header["source"]["files"])})
    if header["task"] == "encode":
        return BlockEncoder(source, parse_tokenizer(parts[0].decode()))
    return BlockCounter(source, header["kind"])


def _serve() -> None:
    coming, going = sys.stdin.buffer, sys.stdout.buffer
    first = receive(coming)
    if first is None:
        return
    task = task_of(first.figures, first.parts)
    while (message := receive(coming)) is not None:
        header = message.figures
        try:
            answer = task.answer(RawBlock(**header, data=message.parts[0])) if header else task.rest()
            send(going, answer.figures, answer.parts)
        except (DataError, ArtefactError) as error:
            send(going, {"fault": type(error).__name__, "lines": error.faults})
        except MemoryError:
            send(going, {"fault": "OutOfMemoryError", "lines": []})


def main() -> None:
    """Work until nothing more comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which ends us
    gc.disable()  # nothing here goes in circles, and millions of words are looked through for nothing
    try:
        _serve()
    except BrokenPipeError:  # the parent has gone
        os._exit(0)


if __name__ == "__main__":
    main()
