"""Finds what looks like the remains of a file format in texts: tables, JSON, HTML, marks between documents."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

LOOKED_AT = 2000  # characters of a text
LEAST_TEXTS = 5  # fewer texts say nothing


class Mark(NamedTuple):
    """One kind of markup. `share` is the least fraction of the texts that have it for it to be worth a line."""

    name: str
    pattern: re.Pattern[str]
    share: float
    remedy: str


NOT_TAGS = r"(?!/?(?:s|unk|pad|bos|eos|mask|url|user|num)>)"  # tokens of corpora that are written like tags
MARKS = (
    Mark("JSON", re.compile(r'\s*[\[{]*\s*"[^"]{1,60}"\s*:'), 0.5, "data.format: jsonl (or json) and data.field"),
    Mark(
        "quoted cells of a table",
        re.compile(r'.*?(?:(?:^|[,;\t])"[^"]|[^"]"(?:[,;\t]|$)|"")', re.DOTALL),
        0.2,
        "if the file is a table, data.format: csv (or tsv) and data.field",
    ),
    Mark("rows of a table with |", re.compile(r"\s*\|.*\|\s*$"), 0.2, "take the text out of the table first"),
    Mark(
        "HTML tags",
        re.compile(rf".*?<{NOT_TAGS}/?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>", re.DOTALL),
        0.05,
        "take the text out of the HTML first, or the model learns to write tags",
    ),
    Mark("HTML entities", re.compile(r".*?&(?:[a-z]{2,6}|#\d+);", re.DOTALL), 0.05, "undo them first (html.unescape)"),
    Mark(
        "marks between documents, such as <|endoftext|>",
        re.compile(r".*?<\|[a-z_]+\|>", re.DOTALL),
        0.01,
        'data.separator: "<|endoftext|>"',
    ),
    Mark(
        "web addresses",
        re.compile(r".*?(?:https?://|www\.)\S", re.DOTALL),
        0.1,
        "take them out, or put one word in their place, unless the model should write them",
    ),
)
DELIMITERS = {"\t": "tsv", ",": "csv", ";": "csv"}


class MarkupCount:
    """Counts in how many texts each kind of markup stands."""

    def __init__(self) -> None:
        self.texts = 0
        self.first: str | None = None
        self._marked: Counter[str] = Counter()
        self._cells: dict[str, Counter[int]] = {delimiter: Counter() for delimiter in DELIMITERS}

    def add(self, texts: Iterable[str]) -> None:
        """Count some texts."""
        for whole in texts:
            text = whole[:LOOKED_AT]
            self.first = text if self.first is None else self.first
            self.texts += 1
            self._marked.update(mark.name for mark in MARKS if mark.pattern.match(text))
            for delimiter, cells in self._cells.items():
                cells[text.count(delimiter)] += 1

    def findings(self) -> list[tuple[str, float, str]]:
        """Return what was found in many texts: its name, the fraction of the texts that have it, and what to do."""
        if self.texts < LEAST_TEXTS:
            return []
        found = [(mark.name, self._marked[mark.name] / self.texts, mark.remedy) for mark in MARKS]
        found = [each for each, mark in zip(found, MARKS, strict=True) if each[1] >= mark.share]
        names = {name for name, *_ in found}
        for delimiter, form in DELIMITERS.items():
            assert self.first is not None
            columns = self.first.count(delimiter)
            share = self._cells[delimiter][columns] / self.texts
            if columns and share >= 0.9 and not names & {"JSON", "HTML tags", "HTML entities"}:
                name = f"a table of {columns + 1} columns with {delimiter!r} between them"
                found.append((name, share, f"data.format: {form} and data.field"))
        return found
