"""The names of the file formats, and which format a file has."""

from pathlib import Path

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.jsonl import JsonlFormat
from lmtrain.data.text.formats.text import TextFormat

# the names that `data.format` takes beside auto (`config/schema.py`); a line of ids is a text, which kind ids encodes
FORMATS: dict[str, type[Format]] = {"text": TextFormat, "jsonl": JsonlFormat, "ids": TextFormat}


def resolve_format(path: str, name: str) -> str:
    """Return the name of a file's format; `auto` chooses by the suffix, `.gz` aside, and takes others as text."""
    if name != "auto":
        return name
    suffix = Path(path.removesuffix(".gz")).suffix
    return next((known for known, format in FORMATS.items() if suffix in format.suffixes), "text")


def format_of(path: str, name: str, field: str) -> Format:
    """Return the format of a file; `field` names the field that holds the text of a record."""
    return FORMATS[resolve_format(path, name)](field)
