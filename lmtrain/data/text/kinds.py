"""Tells by name and content what kind of file a file is, and refuses those that hold no text as they are."""

import os

from lmtrain.data.text.unpacking import inner_suffix
from lmtrain.errors import DataError

SUFFIXES = {
    ".txt": "text", ".text": "text", ".tokens": "text", ".md": "text", ".ids": "ids",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".pq": "parquet",
    ".fasta": "fasta", ".fa": "fasta", ".faa": "fasta", ".fna": "fasta", ".ffn": "fasta", ".fas": "fasta",
}  # fmt: skip
OTHER_KINDS = {  # the first bytes of files that hold no text as they are, and the way out
    b"PK\x03\x04": "a zip archive or an Office file (.xlsx, .ods, .docx); unpack it, or save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an old or an encrypted Office file; open it and save the sheet as CSV (UTF-8)",
    b"%PDF-": "a PDF; extract its text first (pdftotext FILE.pdf FILE.txt)",
    b"{\\rtf": "rich text (RTF); save it as plain text (UTF-8)",
    b"PARE": "an encrypted Parquet file; write it again without encryption",
    b"SQLite format 3": "an SQLite database; write the column with the texts into a CSV file",
    b"\x89HDF": "an HDF5 file; write the texts into a text file",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"ustar": "a tar archive; unpack it, and name the directory",
    b"PAR1": "a Parquet file; data.format: parquet reads it",
}
_CERTAIN = {b"%PDF-", b"{\\rtf"}  # these need not hold a NUL


def files_below(directory: str) -> list[str]:
    """Return the files below a directory that have a known suffix, sorted; hidden ones are left out.

    Raises DataError if there is none.
    """
    found: list[str] = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        known = (name for name in names if inner_suffix(name) in SUFFIXES and not name.startswith("."))
        found += (os.path.join(folder, name) for name in known)
    if not found:
        raise DataError(
            f"{directory}: no file below this directory has a known suffix ({' '.join(SUFFIXES)}); name the files, "
            f"for instance {os.path.join(directory, '*')}"
        )
    return sorted(found)


def refuse_other_kinds(name: str, head: bytes) -> None:
    """Raise DataError if a file that begins with these bytes is of a kind that holds no text as it is."""
    for begin, kind in OTHER_KINDS.items():
        found = head.startswith(begin, 257 if begin == b"ustar" else 0)
        if found and (begin in _CERTAIN or b"\0" in head):  # a text may begin with PARENTS
            raise DataError(f"{name}: {kind}")
