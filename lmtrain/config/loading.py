"""From a YAML file and command-line overrides to a configuration, or to all of its faults, each with its place."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lmtrain.config.contradictions import contradictions
from lmtrain.config.located_yaml import Located, parse_yaml, read_config_text
from lmtrain.config.located_yaml import Path as KeyPath
from lmtrain.config.schema import RENAMED_KEYS, Config, Section
from lmtrain.errors import ConfigError
from lmtrain.system.console import is_text

MOST_FAULTS = 50


def load_config(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Config:
    """Read a configuration file and put `KEY=VALUE` overrides over it.

    Args:
        overrides: keys by their dotted path, values as YAML: `model.hidden_size=256`.
        check_files: the data and tokenizer files named must exist.

    Raises:
        ConfigError: every fault found, a line each: `FILE:LINE:COL: key: what is wrong`.
    """
    located = parse_yaml(read_config_text(str(path)), str(path))
    if not isinstance(located.value, dict):
        what = "empty" if located.value is None else "not a mapping of keys to values"
        raise ConfigError(f"{path}:1:1: {what}; start from configs/quickstart.yaml")
    tree: dict[str, Any] = located.value
    faults = [fault for override in overrides for fault in _override(located, override)]
    for key in tree:
        if tree[key] is None and _section((key,)) is not None:
            tree[key] = {}  # a section whose keys are all left out
    if tree.get("name") is None:
        tree["name"] = Path(path).stem
    config, found = _validate(located)
    faults += found.values()
    if config is None:  # once more without the faulty keys, to find what else is wrong
        tree.setdefault("name", "x")
        if isinstance(data := tree.setdefault("data", {}), dict):
            data.setdefault("train", [os.devnull])
        config, _ = _validate(located)
    if config is not None:
        doubtful = {path[:1] for path in found}  # sections where a contradiction may be a fault's shadow
        others = [*contradictions(config), *(_missing_files(config) if check_files else [])]
        faults += [
            f"{located.place(key)}: {_dotted(key if key in located.places else key[:2])}: {what}"
            for key, what in others
            if key[:1] not in doubtful or "no such file" in what
        ]
    if faults:
        more = [f"{path}: {len(faults) - MOST_FAULTS} more faults"] if len(faults) > MOST_FAULTS else []
        raise ConfigError(*faults[:MOST_FAULTS], *more)
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every key; `load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes all text, so that none of it can be read as a number or a word of another YAML version."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str",
        text,
        style=None if re.fullmatch(r"[a-z_]+(?<!null|true|alse)", text) else '"',
    ),
)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _override(located: Located, override: str) -> Iterator[str]:
    """Put one KEY=VALUE into the tree; yields what is wrong with it."""
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path) or not is_text(key):
        yield f"command line: {override!r}: an override is KEY=VALUE, for instance model.hidden_size=256"
        return
    try:
        value = parse_yaml(text, f"command line: {key}=").value
    except ConfigError as error:
        yield from error.faults
        return
    place = located.value
    for depth, part in enumerate(path[:-1]):
        if place.get(part) is None:
            place[part] = {}
            located.places[path[: depth + 1]] = "command line"
        place = place[part]
        if not isinstance(place, dict):
            yield f"command line: {key}: {_dotted(path[: depth + 1])} is not a section"
            return
    place[path[-1]] = value
    for inside in [inner for inner in located.places if inner[: len(path)] == path]:
        del located.places[inside]  # where the value stood that is replaced
    located.places[path] = "command line"


def _validate(located: Located) -> tuple[Config | None, dict[KeyPath, str]]:
    """The config, or its faults by key; faulty keys are taken out of the tree on the way."""
    try:
        return Config.model_validate(located.value), {}
    except ValidationError as error:
        details: dict[KeyPath, Any] = {}
        for detail in error.errors():
            details.setdefault(_known_path(located, detail["loc"]), detail)
        for path in details:
            _remove(located.value, path)
        order = {place: number for number, place in enumerate(located.places.values())}
        ordered = sorted(details, key=lambda path: order[located.place(path)])
        return None, {
            # a hint at the nearest key takes time, and nobody reads the hundredth
            path: f"{located.place(path)}: {_dotted(path)}: {_what(path, details[path]) if n < MOST_FAULTS else ''}"
            for n, path in enumerate(ordered)
        }


def _known_path(located: Located, loc: KeyPath) -> KeyPath:
    """The path of a pydantic error, without the names of union members that it adds."""
    while loc not in located.places and loc[:-1] in located.places and _section(loc[:-1]) is None:
        loc = loc[:-1]
    return loc


def _section(path: KeyPath) -> type[Section] | None:
    """The section that stands at a path, if one does."""
    section: type[Section] = Config
    for part in path:
        field = section.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        section = kind
    return section


def _what(path: KeyPath, detail: Any) -> str:
    match detail["type"]:
        case "extra_forbidden":
            new_name = RENAMED_KEYS.get(_dotted(path))
            return f"renamed to {new_name}" if new_name else "no such key" + _near_key(path)
        case "missing":
            return "missing; it has no default"
        case "model_type":
            return "a section: keys and values belong below it"
        case "string_pattern_mismatch":
            return "should be a plain file name, without a slash or a leading dot"
    message = re.sub(r"^(Input|List|String|Value) should", "should", detail["msg"])
    given = json.dumps(detail["input"], ensure_ascii=False, default=str)  # as YAML writes it: true, null
    near = ""
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        options = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        close = difflib.get_close_matches(detail["input"].lower(), options, n=1)
        near = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{message}, not {given if len(given) <= 40 else given[:37] + '...'}{near}"


def _near_key(path: KeyPath) -> str:
    """A hint at the key that was meant, here or in another section."""
    section = _section(path[:-1])
    near = difflib.get_close_matches(str(path[-1]), list(section.model_fields), n=1) if section else []
    if near:
        return f" (did you mean {near[0]!r}?)"
    for home in Config.model_fields:
        if (kind := _section((home,))) is not None:
            near = difflib.get_close_matches(str(path[-1]), list(kind.model_fields), n=1, cutoff=0.8)
            if near:
                return f" (did you mean '{home}.{near[0]}'?)"
    return ""


def _remove(tree: Any, path: KeyPath) -> None:
    for part in path[:-1]:
        try:
            tree = tree[part]
        except (KeyError, TypeError, IndexError):
            return
    if isinstance(tree, dict):
        tree.pop(path[-1], None)


def _missing_files(config: Config) -> Iterator[tuple[KeyPath, str]]:
    for key in ("train", "valid", "test"):
        for number, pattern in enumerate(getattr(config.data, key) or []):
            if not os.path.lexists(pattern) and not glob.glob(pattern, recursive=True):
                yield ("data", key, number), f"{pattern}: no such file (paths are relative to {os.getcwd()})"
    path = config.tokenizer.path
    if path is not None and not os.path.isfile(path):
        yield ("tokenizer", "path"), f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}"
