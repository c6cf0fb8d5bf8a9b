"""What the commands share: the options they have in common, the run they load, what they print."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.errors import ConfigError
from lmtrain.system.console import is_text, say

if TYPE_CHECKING:
    from lmtrain.inference.trained_model import TrainedModel


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run directory; left out, the newest under runs/.")
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to compute; auto: cuda where there is one.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Leave control characters as they are on a terminal.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, nothing else.")]


def load_model(run: str | None, device: Device | None) -> TrainedModel:
    """The model of a run; what can be told to be no run of ours is refused before torch is imported."""
    from lmtrain.runs.directory import find_run

    found = find_run(run)
    found.config_and_tokenizer()
    import lmtrain

    return lmtrain.load(found, device or "auto", say)


def silence_stdout() -> None:
    """Nothing more can be written there, not even what Python would flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(row: dict[str, Any]) -> None:
    """One object a line."""
    print(json.dumps(row, ensure_ascii=False))


def check_text(name: str, text: str) -> None:
    """Raises ConfigError where an argument is no text."""
    if not is_text(text):
        raise ConfigError(f"{name} {text[:60]!r}: not text (a NUL, or bytes that are not UTF-8)")


def named(unknown: list[str]) -> str:
    """The first few of the words or characters."""
    different = list(dict.fromkeys(unknown))
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return ", ".join(repr(part[:40]) for part in different[:5]) + more
