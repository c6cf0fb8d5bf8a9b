"""Turns the encodings of files into UTF-8, and names the likely encoding of bytes that are not UTF-8."""

import codecs
import unicodedata
from collections.abc import Iterator
from itertools import chain

from lmtrain.errors import DataError, escape

SAMPLE_BYTES = 1 << 16  # from which the encoding of a file is guessed
# a byte order mark says which encoding a file has; UTF-32's first, since it begins with UTF-16's
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST_MARK = max(map(len, MARKS))
# what the detector may choose from: the encodings of texts in use, not the hundred that Python knows
_CANDIDATES = [
    "cp949", "cp932", "euc_jp", "gb18030", "big5", "cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254",
    "cp1255", "cp1256", "cp1257", "cp1258", "cp874",
]  # fmt: skip


def encoding_of(head: bytes, encoding: str) -> str:
    """Return the encoding of a file that begins with these bytes: that of its mark, or else the given one.

    Examples:
        >>> encoding_of("a".encode("utf-16"), "utf-8")
        'utf-16'
    """
    by_mark = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    return by_mark or ("utf-8" if codecs.lookup(encoding).name == "utf-8-sig" else codecs.lookup(encoding).name)


def to_utf8(name: str, chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Turn chunks into UTF-8 and leave the byte order mark out; UTF-8 is passed on as it is.

    Raises:
        DataError: a byte does not belong to the encoding, with its line and what the encoding may be instead.
    """
    head = b""
    while len(head) < LONGEST_MARK and (chunk := next(chunks, b"")):
        head += chunk
    known = encoding_of(head, encoding)
    if known == "utf-8":
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    decoder, line = codecs.getincrementaldecoder(known)(), 1
    for chunk in chain([head], chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(known, "replace")
            place = f"{name}:{line + before.count(chr(10))}"
            is_marked = known != codecs.lookup(encoding).name
            advice = "it is damaged" if is_marked else likely_encoding(bytes(error.object), error.start)
            raise DataError(f"{place}: not {known} (byte 0x{error.object[error.start]:02x}); {advice}") from None
        line += text.count("\n")
        yield text.encode("utf-8", "surrogatepass")


def likely_encoding(data: bytes, place: int) -> str:
    """Name the likely encodings of some bytes, best first, and how they would read, as advice in a message.

    Args:
        data: bytes around the fault.
        place: index of the byte that is at fault.
    """
    start = max(0, place - SAMPLE_BYTES // 2)
    sample = data[start : start + SAMPLE_BYTES]
    line_start = sample.rfind(b"\n", 0, place - start) + 1
    names = _guess(sample)
    if not names:
        return "is this a text file? (data.encoding)"
    read = [f"as {escape(_first_line(sample[line_start:], name)[:30], kept='')!r} in {name}" for name in names]
    return f"it reads {', or '.join(read)}; set data.encoding: {names[0]}"


def _first_line(data: bytes, encoding: str) -> str:
    return next(iter(data.decode(encoding, "replace").strip("\r\n").splitlines()), "")


def _guess(sample: bytes) -> list[str]:
    """Return the likely encodings of bytes that are not UTF-8, best first; none if the bytes are not like text."""
    for name, nul in (("utf-16-le", 1), ("utf-16-be", 0)):  # in ASCII every second byte is a NUL
        if sample[nul::2].count(0) > len(sample) // 4 and _is_readable(sample.decode(name, "ignore")):
            return [name]
    if b"\0" in sample:
        return []
    from charset_normalizer import from_bytes  # only where a fault is explained: it takes a while to import

    matches = from_bytes(sample, cp_isolation=_CANDIDATES)
    names = [match.encoding for match in matches]
    alike = {name for match in matches for name in match.could_be_from_charset}
    if names and (names[0] in ("cp1250", "cp1252")) and "cp1252" in alike:  # far more texts are West European
        names = list(dict.fromkeys(["cp1252", *names[1:]]))
    return [name for name in names if _is_readable(sample.decode(name, "replace"))][:2]


def _is_readable(text: str) -> bool:
    """Whether a text has no control characters, unassigned ones or ones of private use."""
    odd = {character for character in set(text) if unicodedata.category(character) in ("Cc", "Cn", "Co")}
    return odd <= set("\n\r\t\f\v")
