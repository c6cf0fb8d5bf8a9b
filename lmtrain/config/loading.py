"""Turns a YAML file and command-line overrides into a configuration, or into all of its faults, each with its place."""

import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lmtrain.config.contradictions import contradictions
from lmtrain.config.located_yaml import KeyPath, Located, parse_yaml, read_config_text
from lmtrain.config.schema import RENAMED_KEYS, Config, Section
from lmtrain.errors import ConfigError
from lmtrain.system.console import is_text

MOST_FAULTS = 50


_SIGNS = re.compile("[-%*#=+_|>]+")  # a value that YAML would take for something else than these signs: --- or %%


def load_config(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Config:
    """Read a configuration file and apply `KEY=VALUE` overrides to it.

    Args:
        overrides: keys by their dotted path, with values as YAML: `model.hidden_size=256`.
        check_files: whether the data and tokenizer files that are named must exist.

    Raises:
        ConfigError: all faults that were found, a line each: `FILE:LINE:COL: key: what is wrong`.
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
    config, faults_by_key = _validate(located)
    faults += faults_by_key.values()
    if config is None:  # validate again without the faulty keys, to find what else is wrong
        tree.setdefault("name", "x")
        if isinstance(data := tree.setdefault("data", {}), dict):
            data.setdefault("train", [os.devnull])
        config, _ = _validate(located)
    if config is not None:
        faulty_sections = {key[:1] for key in faults_by_key}  # a contradiction there may only follow from the fault
        others = [(key, reason) for key, reason in contradictions(config) if key[:1] not in faulty_sections]
        faults += [
            f"{located.place(key)}: {_dotted(key if key in located.places else key[:2])}: {reason}"
            for key, reason in [*others, *(_missing_files(config) if check_files else [])]
        ]
    if faults:
        more = [f"{path}: {len(faults) - MOST_FAULTS} more faults"] if len(faults) > MOST_FAULTS else []
        raise ConfigError(*faults[:MOST_FAULTS], *more)
    assert config is not None
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML with every key; `load_config` reads it back to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes all text but plain words, so that no other YAML version reads a text as a number, a bool or null."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = re.fullmatch(r"[a-z_]+(?<!null|true|alse)", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _override(located: Located, override: str) -> Iterator[str]:
    """Put one KEY=VALUE into the tree and yield what is wrong with it."""
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path) or not is_text(key):
        yield f"command line: {override!r}: an override is KEY=VALUE, for instance model.hidden_size=256"
        return
    try:
        value = text if _SIGNS.fullmatch(text) else parse_yaml(text, f"command line: {key}=").value
    except ConfigError as error:
        yield from error.faults
        return
    tree = located.value
    for depth, part in enumerate(path[:-1], 1):
        if tree.get(part) is None:
            tree[part] = {}
            located.places[path[:depth]] = "command line"
        tree = tree[part]
        if not isinstance(tree, dict):
            yield f"command line: {key}: {_dotted(path[:depth])} is not a section"
            return
    tree[path[-1]] = value
    for inside in [inner for inner in located.places if inner[: len(path)] == path]:
        del located.places[inside]  # the places of the value that was replaced
    located.places[path] = "command line"


def _validate(located: Located) -> tuple[Config | None, dict[KeyPath, str]]:
    """Return the configuration, or None and its faults by key. Faulty keys are taken out of the tree."""
    try:
        return Config.model_validate(located.value), {}
    except ValidationError as error:
        details: dict[KeyPath, Any] = {}
        for detail in error.errors():
            details.setdefault(_known_path(located, detail["loc"]), detail)
        for path in details:
            with suppress(KeyError, TypeError, IndexError):  # the key is missing, or a key above it is faulty, too
                if isinstance(section := reduce(getitem, path[:-1], located.value), dict):
                    del section[path[-1]]
        order = {place: number for number, place in enumerate(located.places.values())}
        ordered = sorted(details, key=lambda path: order[located.place(path)])
        return None, {
            # the nearest key takes time to find, and faults beyond MOST_FAULTS are not shown
            path: f"{located.place(path)}: {_dotted(path)}: {_reason(path, details[path]) if n < MOST_FAULTS else ''}"
            for n, path in enumerate(ordered)
        }


def _known_path(located: Located, loc: KeyPath) -> KeyPath:
    """Return the path of a pydantic error without the names of union members that pydantic adds."""
    while loc not in located.places and loc[:-1] in located.places and _section(loc[:-1]) is None:
        loc = loc[:-1]
    return loc


def _section(path: KeyPath) -> type[Section] | None:
    """Return the section at a path; None if the path is a key or is unknown."""
    section: Any = Config
    for part in path:
        field = section.model_fields.get(str(part))
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section  # type: ignore[no-any-return]


def _reason(path: KeyPath, detail: Any) -> str:
    """Return the message for one of pydantic's errors."""
    match detail["type"]:
        case "extra_forbidden":
            new_name = RENAMED_KEYS.get(_dotted(path))
            return f"renamed to {new_name}" if new_name else "no such key" + _nearest_key(path)
        case "missing":
            return "missing; it has no default"
        case "model_type":
            return "a section: keys and values belong below it"
        case "string_pattern_mismatch":
            return "should be a plain file name, without a slash or a leading dot"
    message = re.sub(r"^(Input|List|String|Value) should", "should", detail["msg"])
    given = json.dumps(detail["input"], ensure_ascii=False, default=str)  # as YAML writes it: true, null
    options = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) if detail["type"] == "literal_error" else []
    hint = _did_you_mean(str(detail["input"]).lower(), options)
    return f"{message}, not {given if len(given) <= 40 else given[:37] + '...'}{hint}"


def _nearest_key(path: KeyPath) -> str:
    """Return a hint at the key that was probably meant, in the same section or in another."""
    name, section = str(path[-1]), _section(path[:-1])
    hint = _did_you_mean(name, section.model_fields) if section else ""
    for home in Config.model_fields:
        if not hint and (other := _section((home,))) is not None:
            hint = _did_you_mean(name, other.model_fields, f"{home}.", cutoff=0.8)
    return hint


def _did_you_mean(word: str, options: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return f" (did you mean {prefix + nearest[0]!r}?)" if nearest else ""


def _missing_files(config: Config) -> Iterator[tuple[KeyPath, str]]:
    for key in ("train", "valid", "test"):
        for number, pattern in enumerate(getattr(config.data, key) or []):
            if pattern == "-":
                yield ("data", key, number), "standard input is for check, score and evaluate; training reads files"
            elif not os.path.lexists(pattern) and not glob.glob(pattern, recursive=True):
                yield ("data", key, number), f"{pattern}: no such file (paths are relative to {os.getcwd()})"
    path = config.tokenizer.path
    if path is not None and not os.path.isfile(path):
        yield ("tokenizer", "path"), f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}"
