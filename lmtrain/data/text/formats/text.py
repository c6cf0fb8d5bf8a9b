"""Plain text: every line is a text, or what `data.separator` says."""

import re

from lmtrain.data.text.formats.base import Format, Keys
from lmtrain.data.text.normalise import normalise, spellings_of
from lmtrain.data.text.reading import LONGEST_RECORD_BYTES, Block, RawBlock, decode

_SINGLE_SPACE = re.compile(rb"(?<=\S) (?=\S)")
# between two signs of ASCII, two ideographs or two syllables of Hangul, which no normalisation joins
_BETWEEN_SIGNS = re.compile(rb"(?<=[!-~])(?=[!-~])|(?<=[\xe4-\xed][\x80-\xbf]{2})(?=[\xe4-\xed])")
LONGEST_COMPOSED_BYTES = 16  # of what may compose with the letter before it
BLANK_LINES = re.compile(r"(?:\A|\n)(?:[^\S\n]*\n)+")  # with the end of the line before


class PlainFormat(Format):
    """Plain text, whose records may have any length in a stream."""

    may_be_cut = True
    longest_end = 0  # bytes of the longest separator that a cut could tear

    def inner_end(self, data: bytes) -> int:
        """Return the last place before a single space, where a cut changes no token.

        A record of 16 MiB without such a space is cut between two signs of ASCII or of East Asia.
        """
        patterns = [_SINGLE_SPACE, *([_BETWEEN_SIGNS] if len(data) > LONGEST_RECORD_BYTES else [])]
        last = max(0, len(data) - self.longest_end)
        for pattern in patterns:
            for window in (1 << 12, len(data)):
                if found := list(pattern.finditer(data, max(0, last - window), last)):
                    return found[-1].start()
        return 0


class LinesFormat(PlainFormat):
    """Every line is a text; a blank line is an empty text or one of white space."""

    lines_are_records = True
    ends_with_file = False  # in a stream the end token of a line is its newline

    def details(self, header: str) -> str:
        return "a line ends with an end token" if self.keys.stream else "each line is a sequence"

    def parse(self, raw: RawBlock) -> Block:
        lines = decode(raw).split("\n")
        return Block(raw.path, range(raw.first_line, raw.first_line + len(lines)), lines, raw.ended)

    def unsplit_texts(self, raw: RawBlock) -> list[str]:
        return [decode(raw)]


class PassagesFormat(PlainFormat):
    """Every text ends at a blank line (`paragraph`), at the end of the file (`file`), or at a text of one's own.

    The line breaks at both ends of a text are not part of it.
    """

    record = "passage"

    def __init__(self, keys: Keys) -> None:
        super().__init__(keys)
        self._own = ""  # a separator of one's own
        match keys.separator:
            case "paragraph":
                self._ends, byte_ends = BLANK_LINES, r"\n[ \t]*\n"
            case "file":
                self._ends = re.compile(byte_ends := r"(?!)")  # matches nowhere
            case own:
                self._own, spellings = normalise(own), spellings_of(own)
                self._ends = re.compile(re.escape(self._own))
                byte_ends = "|".join(map(re.escape, spellings))
                self.longest_end = LONGEST_COMPOSED_BYTES + max(len(each.encode()) for each in spellings)
        self._byte_ends = re.compile(byte_ends.encode())

    def details(self, header: str) -> str:
        ends = {"paragraph": "a blank line ends a sequence", "file": "the file is one sequence"}
        return ends.get(self.keys.separator, f"{self.keys.separator!r} ends a sequence")

    def record_end(self, data: bytes) -> int:
        ends = [found.end() for found in self._byte_ends.finditer(data)]
        while ends and self._own and not self._is_whole(data[ends[-1] : ends[-1] + LONGEST_COMPOSED_BYTES]):
            del ends[-1]
        return ends[-1] if ends else 0

    def _is_whole(self, following: bytes) -> bool:
        """Whether it is known what follows a separator of one's own, and no accent in it changes the separator."""
        text = following.decode("utf-8", "ignore")
        return text != "" and normalise(self._own + text).startswith(self._own)

    def parse(self, raw: RawBlock) -> Block:
        text, line, begin = decode(raw), raw.first_line, 0
        if self.keys.separator == "paragraph" and not raw.unfinished:
            text += "\n\n"  # the end of a file or block ends its last paragraph
        lines: list[int] = []
        texts: list[str] = []
        for end, next_begin in [*(found.span() for found in self._ends.finditer(text)), (len(text), len(text))]:
            passage = text[begin:end]
            inner = passage.lstrip("\n")
            lines.append(line + len(passage) - len(inner))
            texts.append(inner.rstrip("\n"))
            line, begin = line + text.count("\n", begin, next_begin), next_begin
        if self.keys.separator == "paragraph":
            kept = [(number, passage) for number, passage in zip(lines, texts, strict=True) if passage]
            lines, texts = [number for number, _ in kept], [passage for _, passage in kept]
        elif not texts[-1]:  # a separator at the end of a file begins no text
            del lines[-1], texts[-1]
        return Block(raw.path, lines, texts, raw.ended)
