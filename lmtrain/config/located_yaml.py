"""YAML text to plain values with the line and column of each, for configuration files.

A small, strict subset, read from PyYAML's events, so that nothing is built before it is judged: mappings, lists and
scalars; no tags, anchors, aliases or merge keys (bombs are refused before they are expanded), no duplicate keys, one
document. Scalars follow YAML 1.2: `yes` is a word, `1e-3` a number.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import Any

import yaml

from lmtrain.errors import ConfigError
from lmtrain.system.console import decode_utf8, is_text

LARGEST_BYTES = 1 << 20
DEEPEST = 16
LONGEST_NUMBER = 64
MOST_EVENTS = 10_000  # keys, values, beginnings and ends: some twenty times what all the keys take

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass
class Located:
    """A document's value and, for each path of keys and indices in it, the `FILE:LINE:COL` where it stands."""

    value: Any = None
    places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """Where the path stands, or the nearest enclosing one that does."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def parse_yaml(text: str, name: str) -> Located:
    """Read one document.

    Args:
        name: the file's name, or what else its places should be called by.

    Raises:
        ConfigError: the faults, each with its place; of a syntax error the first one only.
    """
    located, faults = Located(places={(): f"{name}:1:1"}), []
    try:
        faults = _Builder(text, name, located).build()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or "not YAML"
        mend = " (indent with spaces)" if "'\\t'" in problem else ""
        raise ConfigError(f"{place}: {problem}{mend}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigError(f"{place}: a control character (U+{ord(text[error.position]):04X}); remove it") from None
    except (ValueError, OverflowError):
        beyond = re.search(r"\\U(?!0010|000)[0-9A-Fa-f]{8}", text)
        assert beyond is not None  # else a bug
        before = text[: beyond.start()]
        place = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise ConfigError(*faults, f"{place}: an escape beyond Unicode ({beyond[0]})") from None
    if faults:
        raise ConfigError(*faults)
    return located


def read_config_text(path: str) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: no such file, not a file, not UTF-8, over 1 MiB.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ConfigError(f"{path}: not a regular file")
        with open(path, "rb") as handle:
            data = handle.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or 'can not be read').lower()}") from None
    if len(data) > LARGEST_BYTES:
        raise ConfigError(f"{path}: over {LARGEST_BYTES >> 20} MiB; is this a configuration file?")
    try:
        return decode_utf8(data, path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


class _Builder:
    """Builds the value from the parser's events, with a stack of open collections instead of recursion."""

    def __init__(self, text: str, name: str, located: Located) -> None:
        self.text, self.name, self.located = text, name, located
        self.faults: list[str] = []
        self.open: list[tuple[Any, Path]] = []  # collections that are not closed yet
        self.key: str | None = None  # the mapping key whose value comes next
        self.key_place = ""
        self.documents = 0

    def build(self) -> list[str]:
        for number, event in enumerate(yaml.parse(self.text, Loader=yaml.SafeLoader)):
            if number > MOST_EVENTS:
                raise ConfigError(*self.faults[:1], self._line(event, "too long; is this a configuration file?"))
            match event:
                case yaml.DocumentStartEvent():
                    self.documents += 1
                    if self.documents == 2:
                        self._fault(event, "a second document; a configuration file holds one")
                        break
                case yaml.AliasEvent():
                    self._fault(event, f"alias *{event.anchor}; write the value out")
                    self._add(None, event)
                case yaml.ScalarEvent():
                    self._check_node(event)
                    self._scalar(event)
                case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                    self._check_node(event)
                    value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
                    if isinstance(self._top(), dict) and self.key is None:
                        raise ConfigError(*self.faults, self._line(event, "a key is a word, not a list or mapping"))
                    path = self._add(value, event)
                    self.open.append((value, path))
                    if len(self.open) > DEEPEST:
                        raise ConfigError(*self.faults, self._line(event, f"nested more than {DEEPEST} deep"))
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    self.open.pop()
        return self.faults

    def _top(self) -> Any:
        return self.open[-1][0] if self.open else None

    def _line(self, event: Any, what: str) -> str:
        return f"{self.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}: {what}"

    def _fault(self, event: Any, what: str) -> None:
        self.faults.append(self._line(event, what))

    def _check_node(self, event: Any) -> None:
        if event.tag is not None:
            self._fault(event, f"tag {event.tag[:60]!r}; values have no tags here")
        if event.anchor is not None:
            self._fault(event, f"anchor &{event.anchor}; write the value out where it is used")

    def _scalar(self, event: Any) -> None:
        if isinstance(self._top(), dict) and self.key is None:
            key = self._text(event)
            self.key_place = self._line(event, "").removesuffix(": ")
            if key in self._top():
                dotted = ".".join(map(str, (*self.open[-1][1], key)))
                first = self.located.places[(*self.open[-1][1], key)]
                self._fault(event, f"{dotted}: the key stands twice (first at {first})")
            elif key == "<<":
                self._fault(event, "a merge key; write the values out")
            self.key = key
            return
        self._add(self._value(event), event)

    def _text(self, event: Any) -> str:
        text: str = event.value
        if is_text(text):
            return text
        self._fault(event, "a NUL or half a surrogate pair in a text")
        return ""

    def _value(self, event: Any) -> Any:
        text = self._text(event)
        if event.style is not None:  # quoted or block text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text) or _FLOAT.fullmatch(text):
            if len(text) > LONGEST_NUMBER:
                self._fault(event, f"a number of {len(text)} characters")
                return 0
            return int(text) if _INT.fullmatch(text) else float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return text

    def _add(self, value: Any, event: Any) -> Path:
        top = self._top()
        place = self._line(event, "").removesuffix(": ")
        if isinstance(top, dict):
            if self.key is None:  # an alias in a key's place
                return ()
            path = (*self.open[-1][1], self.key)
            top[self.key], self.key = value, None
            place = self.key_place
        elif isinstance(top, list):
            path = (*self.open[-1][1], len(top))
            top.append(value)
        else:
            path, self.located.value = (), value
        self.located.places.setdefault(path, place)
        return path
