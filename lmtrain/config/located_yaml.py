"""Reads YAML text into plain values and remembers the line and column of each, for configuration files.

Only a small and strict part of YAML is accepted: one document of mappings, lists and scalars, without tags, anchors,
aliases, merge keys or duplicate keys. PyYAML composes the nodes, whose marks give the places; `_Composer` refuses the
rest on the way, so that an alias bomb is refused before it is expanded. Scalars follow YAML 1.2: `yes` is a word and
`1e-3` is a number.
"""

import os
import re
import stat
from typing import Any, NamedTuple, NoReturn

import yaml

from lmtrain.errors import ConfigError
from lmtrain.system.console import decode_utf8, is_text

LARGEST_BYTES = 1 << 20
DEEPEST = 16
LONGEST_NUMBER = 64
MOST_EVENTS = 10_000  # keys, values, starts and ends: about twenty times what a file with every key has
KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Located(NamedTuple):
    """A document's value and, for each path of keys and indices in it, the `FILE:LINE:COL` where it stands."""

    value: Any
    places: dict[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """Return where the path stands, or where the nearest enclosing path stands that is in the file."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def parse_yaml(text: str, name: str) -> Located:
    """Read one YAML document.

    Args:
        name: the file's name, or another name with which places begin.

    Raises:
        ConfigError: all faults, each with its place; reading ends at the first syntax error.
    """
    try:
        composer = _Composer(text, name)
        value = composer.read()
        if composer.faults:
            raise ConfigError(*composer.faults)
        return Located(value, composer.places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or "not YAML"
        remedy = " (indent with spaces)" if "'\\t'" in problem else ""
        raise ConfigError(f"{place}: {problem}{remedy}") from None
    except yaml.reader.ReaderError as error:
        position, problem = error.position, f"a control character (U+{ord(text[error.position]):04X}); remove it"
    except (ValueError, OverflowError):
        beyond = re.search(r"\\U(?!0010|000)[0-9A-Fa-f]{8}", text)
        assert beyond is not None  # else a bug
        position, problem = beyond.start(), f"an escape beyond Unicode ({beyond[0]})"
    before = text[:position]
    raise ConfigError(f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: {problem}")


def read_config_text(path: str) -> str:
    """Return the text of a regular UTF-8 file of at most 1 MiB; raises ConfigError if there is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ConfigError(f"{path}: not a regular file")
        with open(path, "rb") as handle:
            data = handle.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            raise ConfigError(f"{path}: over {LARGEST_BYTES >> 20} MiB; is this a configuration file?")
        return decode_utf8(data, path)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except ValueError as error:  # the path holds a NUL or half a surrogate pair
        raise ConfigError(str(error)) from None


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which notes the faults and the places of a text and stops where a limit is passed."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.file_name, self.events = name, 0
        self.path: KeyPath = ()  # path of the collection that is being composed
        self.places: dict[KeyPath, str] = {(): f"{name}:1:1"}
        self.faults: list[str] = []

    def read(self) -> Any:
        """Return the value of the only document."""
        node = self.get_node() if self.check_node() else None
        if not isinstance(event := self.get_event(), yaml.StreamEndEvent):
            self._add_fault(event, "a second document; a configuration file holds one")
        return None if node is None or self.faults else _value_of(node)

    def get_event(self) -> Any:
        """Return PyYAML's next event; refuse a text of more than `MOST_EVENTS`."""
        event = super().get_event()  # type: ignore[no-untyped-call]
        self.events += 1
        if self.events > MOST_EVENTS + 1:
            del self.faults[1:]
            self._stop(event, "too long; is this a configuration file?")
        return event

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Check PyYAML's next event before a node is made of it. `index`: an item's number, a value's key, or None."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        path, is_key = self.path, isinstance(parent, yaml.MappingNode) and index is None
        if isinstance(parent, yaml.SequenceNode):
            self.path = (*path, index)
            self.places.setdefault(self.path, self._place(event))
        elif isinstance(parent, yaml.MappingNode) and not is_key:
            self.path = (*path, index.value)
        if isinstance(event, yaml.AliasEvent):
            self._add_fault(event, f"alias *{event.anchor}; write the value out")
            self.get_event()
            node: yaml.Node | None = yaml.ScalarNode("", "", None, None)
        else:
            self._check(event, is_key)
            node = super().compose_node(parent, index)
        self.path = path
        return node

    def _check(self, event: Any, is_key: bool) -> None:
        if event.tag is not None:
            self._add_fault(event, f"tag {event.tag[:60]!r}; values have no tags here")
        if event.anchor is not None:
            self._add_fault(event, f"anchor &{event.anchor}; write the value out where it is used")
            event.anchor = None
        if not isinstance(event, yaml.ScalarEvent):
            if is_key:
                self._stop(event, "a key is a word, not a list or mapping")
            if len(self.path) == DEEPEST:
                self._stop(event, f"nested more than {DEEPEST} deep")
        elif not is_text(event.value):
            self._add_fault(event, "a NUL or half a surrogate pair in a text")
        elif is_key:
            self._check_key(event)
        elif len(event.value) > LONGEST_NUMBER and event.style is None and _FLOAT.fullmatch(event.value):
            self._add_fault(event, f"a number of {len(event.value)} characters")

    def _check_key(self, event: Any) -> None:
        path = (*self.path, event.value)
        if path in self.places:
            dotted = ".".join(map(str, path))
            self._add_fault(event, f"{dotted}: the key stands twice (first at {self.places[path]})")
            event.value += f" at {self._place(event)}"  # so that the keys below it are not taken for those of the first
        elif event.value == "<<":
            self._add_fault(event, "a merge key; write the values out")
        self.places[*self.path, event.value] = self._place(event)

    def _place(self, event: Any) -> str:
        return f"{self.file_name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _add_fault(self, event: Any, what: str) -> None:
        self.faults.append(f"{self._place(event)}: {what}")

    def _stop(self, event: Any, what: str) -> NoReturn:
        self._add_fault(event, what)
        raise ConfigError(*self.faults)


def _value_of(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _value_of(value) for key, value in node.value}
    text = node.value
    if node.style is not None:  # quoted or block text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text
