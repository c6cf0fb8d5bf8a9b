"""The names of the file formats, and which format a file has."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

from lmtrain.data.text.formats.base import Format, Keys
from lmtrain.data.text.formats.delimited import CsvFormat, TsvFormat
from lmtrain.data.text.formats.fasta import FastaFormat
from lmtrain.data.text.formats.json_array import JsonArrayFormat, fields_with_records
from lmtrain.data.text.formats.jsonl import JsonlFormat
from lmtrain.data.text.formats.parquet import ParquetFormat
from lmtrain.data.text.formats.text import LinesFormat, PassagesFormat
from lmtrain.data.text.kinds import SUFFIXES
from lmtrain.data.text.reading import Block, first_chunk, open_text, read_chunks
from lmtrain.data.text.unpacking import inner_suffix
from lmtrain.errors import DataError

# the names that `data.format` takes beside auto (`config/schema.py`); ids in a text are encoded by kind ids
FORMATS: dict[str, type[Format]] = {
    "text": LinesFormat,
    "jsonl": JsonlFormat,
    "json": JsonArrayFormat,
    "csv": CsvFormat,
    "tsv": TsvFormat,
    "parquet": ParquetFormat,
    "fasta": FastaFormat,
    "ids": LinesFormat,
}
_FASTA = re.compile(rb">[^\n]*\n[A-Za-z*\n.-]+(>|\Z)")


def detect_format(path: str, encoding: str) -> tuple[str, str]:
    """Return the name of a file's format, and why: by its suffix, or, where that says nothing, by its content.

    Raises DataError if a file without a known suffix can't be read.
    """
    by_suffix = SUFFIXES.get(inner_suffix(path))
    if by_suffix is not None and by_suffix != "json":
        return by_suffix, "by its suffix"
    with open_text(path) as handle:
        if handle.read(4) == b"PAR1":
            return "parquet", "by its content"
    head = first_chunk(path, encoding).lstrip()
    if re.match(rb"\[\s*[{\"\]]", head):
        return "json", "by its content"
    with suppress(ValueError):  # `{` alone begins an object of several lines
        first, _, rest = head.partition(b"\n")
        if head.startswith(b"{") and isinstance(record := json.loads(first), dict):
            is_array = not rest.strip() and fields_with_records(record)  # of which `json` says how to get at it
            return "json" if is_array else "jsonl", "by its content"
    if by_suffix == "json":
        return by_suffix, "by its suffix"
    return ("fasta", "by its content") if _FASTA.match(head) else ("text", "a file without a known suffix")


def resolve_format(path: str, name: str, encoding: str = "utf-8") -> str:
    """Return the name of a file's format; `auto` detects it."""
    return detect_format(path, encoding)[0] if name == "auto" else name


def format_of(path: str, keys: Keys) -> Format:
    """Return the format of a file, whose name is in `keys.format`, never auto.

    Raises DataError if its records end elsewhere than the separator says.
    """
    form = FORMATS[keys.format]
    if keys.separator != "line":
        if not issubclass(form, LinesFormat):
            raise DataError(
                f"{path}: data.separator {keys.separator!r} goes with plain text; a file of the format {keys.format} "
                "has a text in each record"
            )
        form = PassagesFormat
    return form(keys)


def read_plain_text(handle: IO[bytes], name: str, separator: str = "line", encoding: str = "utf-8") -> Iterator[Block]:
    """Read the texts of an open binary file, such as standard input; raises DataError with this name and the line."""
    form = format_of(name, Keys("text", separator=separator, encoding=encoding))
    return map(form.parse, form.cut(name, read_chunks(name, handle, encoding)))
