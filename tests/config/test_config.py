"""The configuration: every fault at once with its place, before torch; round trips; templates; the table of keys."""

import contextlib
import re
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config import Config, dump_config, load_config
from lmtrain.config.contradictions import contradictions
from lmtrain.errors import ConfigError
from lmtrain.runs.weights import build_model
from tests.conftest import ROOT, SHARED

TEMPLATES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a b\n")
    return tmp_path


def load(text, *overrides):
    with open("c.yaml", "w", encoding="utf-8") as handle:
        handle.write(text)
    return load_config("c.yaml", overrides)


def faults(text, *overrides):
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    assert error.value.exit_code == 2
    return list(error.value.faults)


FIVE = """\
data:
  train: t.txt
  vald: t.txt
model:
  hidden_sze: 256
  cell: lsmt
optimizer: {lr: true}
training:
  max_epochs: 0
"""


def test_five_faults_are_five_lines_with_line_and_column():
    expected = [  # {words} is what pydantic says
        "c.yaml:3:3: data.vald: no such key (did you mean 'valid'?)",
        "c.yaml:5:3: model.hidden_sze: no such key (did you mean 'hidden_size'?)",
        "c.yaml:6:3: model.cell: {words}, not \"lsmt\" (did you mean 'lstm'?)",
        "c.yaml:7:13: optimizer.lr: {words}, not true",
        "c.yaml:9:3: training.max_epochs: {words} 1, not 0",
    ]
    found = faults(FIVE)
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert re.fullmatch(re.escape(wanted).replace(re.escape("{words}"), ".+"), line)


def test_five_faults_at_the_command_line_before_torch_is_imported(directory):
    (directory / "c.yaml").write_text(FIVE)
    (directory / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "lmtrain", "train", "c.yaml"], capture_output=True, text=True, env={"PYTHONPATH": "."}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 5
    assert done.stdout == ""
    assert sorted(path.name for path in directory.iterdir() if path.suffix != ".pyc") == ["c.yaml", "t.txt", "torch.py"]


D = "data: {train: t.txt}\n"


def test_precedence_is_defaults_then_file_then_command_line():
    config = load(D + "model: {hidden_size: 7, cell: gru}\noptimizer:\n", "model.hidden_size=9", "optimizer.lr=1e-2")
    assert (config.model.num_layers, config.model.cell, config.model.hidden_size) == (2, "gru", 9)
    assert (config.optimizer.lr, config.name, config.data.train) == (0.01, "c", ["t.txt"])


@pytest.mark.parametrize("value", ["1e-3", "1.0e-3", ".001", "0.001", "+1e-03"])
def test_a_number_in_any_notation_is_read_as_one(value):
    assert load(D + f"optimizer: {{lr: {value}}}").optimizer.lr == 0.001


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_loads(path, monkeypatch):
    assert {"quickstart", "sample_ids"} < {each.stem for each in TEMPLATES}
    monkeypatch.chdir(ROOT)
    elsewhere = path.parent.name == "recipes" and (not SHARED.is_dir() or path.stem.startswith("ptb-like"))
    load_config(path, check_files=not elsewhere)  # the corpora of recipes; one is cut from another
    text = path.read_text()
    assert text.count("#") > 2  # commented


def test_the_published_shape_has_at_most_35_million_weights():
    with torch.device("meta"):
        model = build_model(load_config(ROOT / "configs/recipes/wikitext2.yaml", check_files=False), 33_280)
    assert 33_000_000 < sum(weight.numel() for weight in model.parameters()) <= 35_000_000


def test_templates_use_every_kind_of_text_and_both_cells(monkeypatch):
    configs = [load_config(path, check_files=False) for path in TEMPLATES]
    assert {"char", "word", "bpe", "ids"} <= {config.tokenizer.kind for config in configs}
    assert {"lstm", "gru"} <= {config.model.cell for config in configs}


SCHEMA = Config.model_json_schema()
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def values_of(schema):
    """Any value that a part of the schema takes by itself."""
    match schema:
        case {"$ref": reference}:
            return values_of(SCHEMA["$defs"][reference.rpartition("/")[2]])
        case {"enum": options}:
            return st.sampled_from(options)
        case {"anyOf": options}:
            return st.one_of(map(values_of, options))
        case {"type": "null"}:
            return st.none()
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "integer"}:
            return st.integers(schema["minimum"], schema.get("maximum"))
        case {"type": "number"}:
            least, most = (schema.get(f"exclusive{end}", schema.get(end.lower())) for end in ("Minimum", "Maximum"))
            open_ends = {f"exclude_{end[:3].lower()}": f"exclusive{end}" in schema for end in ("Minimum", "Maximum")}
            return st.floats(least, most, allow_infinity=False, **open_ends)
        case {"type": "array"}:
            least = schema.get("minItems", 0)
            return st.lists(values_of(schema["items"]), min_size=least, max_size=max(least, 2))
        case {"type": "string", "pattern": pattern}:
            return st.from_regex(pattern, fullmatch=True, alphabet=LETTERS).filter(lambda text: len(text) <= 200)
        case {"type": "string"}:
            return st.text(LETTERS, min_size=schema.get("minLength", 0), max_size=20)
        case {"type": "object"}:
            keys = {key: values_of(part) for key, part in schema["properties"].items()}
            if "encoding" in keys:
                keys["encoding"] = st.sampled_from(["utf-8", "cp949", "utf-16"])
            needed = {key: keys.pop(key) for key in schema.get("required", [])}
            return st.fixed_dictionaries(needed, optional=keys)
    raise AssertionError(schema)


def agreeing(tree):
    """The configuration of a tree, without the keys that contradict each other."""
    config = Config.model_validate(tree)
    while found := [path for path, _ in contradictions(config)]:
        for section, key in found:
            if tree.get(section, {}).pop(key, None) is None:  # what it contradicts is elsewhere in its section
                tree[section] = {"train": ["t.txt"]} if section == "data" else {}
        config = Config.model_validate(tree)
    return config


@settings(max_examples=100)
@given(tree=values_of(SCHEMA))
def test_dumped_and_loaded_it_is_the_same(tree):
    config = agreeing(tree)
    text = dump_config(config)
    with open("c.yaml", "wb") as handle:
        handle.write(text.encode())
    assert load_config("c.yaml", check_files=False) == config
    assert yaml.safe_load(text) == config.model_dump()  # other programs read it alike


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=200), st.text("{}[]:,-?&*!|>'\"%@`#\n\t ab<1.e", max_size=80).map(str.encode)))
def test_any_bytes_are_a_config_or_a_config_error(data):
    with open("c.yaml", "wb") as handle:
        handle.write(data)
    with contextlib.suppress(ConfigError):
        load_config("c.yaml")


def test_the_table_of_keys_is_the_schema_s():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "config_table.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_key_is_explained():
    def keys(model):
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                yield from keys(kind)
            else:
                yield name, field.description

    explained = list(keys(Config))
    assert len(explained) > 50
    assert [name for name, description in explained if not description] == []
    assert [name for name, description in explained if not description.endswith(".")] == []
