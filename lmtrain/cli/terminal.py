"""The options that several commands have, and how they load a run and print."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmtrain.errors import ConfigError, LmtrainError
from lmtrain.system.console import is_text, say
from lmtrain.system.files import scratch_directory

if TYPE_CHECKING:
    from lmtrain.inference.trained_model import TrainedModel


Device = Literal["auto", "cpu", "cuda", "mps"]
RUN_HELP = "A run directory, for instance runs/quickstart; left out, the newest run under runs/."
DEVICE_HELP = "Where to compute. auto: CUDA if it is there; train: Apple's GPU (mps) where it is faster than the CPU."
RunArgument = Annotated[str | None, typer.Argument(metavar="RUN", help=RUN_HELP)]
DeviceOption = Annotated[Device | None, typer.Option(help=DEVICE_HELP)]
RawOption = Annotated[bool, typer.Option("--raw", help="Print control characters to a terminal unescaped.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line on stdout, and nothing else.")]


def load_model(run: str | None, device: Device | None) -> TrainedModel:
    """Load the model of a run. A directory that cannot be used is refused before torch is imported."""
    from lmtrain.runs.directory import find_run

    directory = find_run(run)
    directory.config_and_tokenizer()
    import lmtrain
    from lmtrain.system.device import make_deterministic

    model = lmtrain.load(directory, device or "auto", say)
    make_deterministic(model.model.embedding.weight.device)
    return model


@contextmanager
def standard_input_as_file(
    arguments: Sequence[str], sign: str = "-"
) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """Put the path of a copy of standard input, which is removed at the end, in place of `-`.

    Yields the arguments, and a function that puts the words standard input in place of the path, as in faults.

    Args:
        sign: the argument that asks for this: `-`, or `key=-`.
    """
    if sign not in arguments:
        yield list(arguments), str
        return
    with scratch_directory() as folder:
        copy = folder / "standard-input"
        with open(copy, "wb") as handle:
            shutil.copyfileobj(sys.stdin.buffer, handle)

        def named(text: str) -> str:
            return text.replace(str(copy), "standard input")

        try:
            yield [sign.removesuffix("-") + str(copy) if each == sign else each for each in arguments], named
        except LmtrainError as error:
            raise type(error)(*map(named, error.faults)) from None


def silence_stdout() -> None:
    """Discard everything that is still to be written to stdout, including what Python flushes when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def silence_lost_stderr() -> None:
    """Discard what stderr still holds if nobody can take it: Python would flush it when it ends, and exit with 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def print_json(row: dict[str, Any]) -> None:
    """Print one object on a line of its own. Its letters stay as they are where stdout can hold every letter."""
    print(json.dumps(row, ensure_ascii=codecs.lookup(sys.stdout.encoding).name != "utf-8"))


def check_text(name: str, text: str) -> None:
    """Raise ConfigError if the value of an argument is not text."""
    if not is_text(text):
        raise ConfigError(f"{name} {text[:60]!r}: not text (a NUL, or bytes that are not UTF-8)")


def named(unknown: list[str]) -> str:
    """Name the first five different words or characters, and count the others."""
    different = list(dict.fromkeys(unknown))
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return ", ".join(repr(part[:40]) for part in different[:5]) + more
