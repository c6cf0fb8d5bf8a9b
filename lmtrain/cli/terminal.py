"""What the commands share: the options they have in common, and how they write to a terminal."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from lmtrain.errors import ConfigError


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


def escape(text: str) -> str:
    """Text whose control characters are written out (`\\x1b`), so that it can't drive a terminal."""

    def written_out() -> Iterator[str]:
        for character in text:
            if unicodedata.category(character) == "Cc" and character not in "\n\t":
                yield f"\\x{ord(character):02x}"
            else:
                yield character

    return "".join(written_out())


def tell(line: str) -> None:
    print(escape(line), file=sys.stderr, flush=True)


def silence_stdout() -> None:
    """Nothing more can be written there, not even what Python would flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(row: dict[str, Any]) -> None:
    """One object a line."""
    print(json.dumps(row, ensure_ascii=False))


def check_text(name: str, text: str) -> None:
    """Raises ConfigError where an argument is no text."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{name} {text[:60]!r}: not text (a NUL, or bytes that are not UTF-8)")


def named(unknown: list[str]) -> str:
    """The first few of the words or characters."""
    different = list(dict.fromkeys(unknown))
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return ", ".join(repr(part[:40]) for part in different[:5]) + more
