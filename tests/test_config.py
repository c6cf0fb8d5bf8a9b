"""The configuration: every fault at once with its place, before torch; round trips; templates; the README's table."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config import Config, dump_config, load_config
from lmtrain.errors import ConfigError
from lmtrain.run import build_model
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
    assert faults(FIVE) == [
        "c.yaml:3:3: data.vald: no such key (did you mean 'valid'?)",
        "c.yaml:5:3: model.hidden_sze: no such key (did you mean 'hidden_size'?)",
        "c.yaml:6:3: model.cell: should be 'lstm', 'gru' or 'rnn', not \"lsmt\" (did you mean 'lstm'?)",
        "c.yaml:7:13: optimizer.lr: should be a valid number, not true",
        "c.yaml:9:3: training.max_epochs: should be greater than or equal to 1, not 0",
    ]


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


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "c.yaml:1:1: empty"),
        ("- a\n", "c.yaml:1:1: not a mapping"),
        ("# nothing\n", "c.yaml:1:1: empty"),
        ("data:\n\ttrain: t.txt\n", "c.yaml:2:1: found character '\\t' that cannot start any token (indent"),
        (D + "data: {train: t.txt}\n", "c.yaml:2:1: data: the key stands twice (first at c.yaml:1:1)"),
        (D + "model: {cell: gru, cell: rnn}", "c.yaml:2:20: model.cell: the key stands twice (first at c.yaml:2:9)"),
        (D + "layers: 3\n", "c.yaml:2:1: layers: no such key"),
        (D + "hidden_size: 3\n", "c.yaml:2:1: hidden_size: no such key (did you mean 'model.hidden_size'?)"),
        (D + "optimizer: {lr: fast}\n", "c.yaml:2:13: optimizer.lr: should be a valid number, not \"fast\""),
        (D + "yes: no\n", "c.yaml:2:1: yes: no such key"),
        (D + "seed: true\n", "c.yaml:2:1: seed: should be a valid integer, not true"),
        (D + "seed: 1.5\n", "c.yaml:2:1: seed: should be a valid integer, not 1.5"),
        (D + "optimizer: {lr: .nan}\n", "c.yaml:2:13: optimizer.lr: should be a finite number, not NaN"),
        (D + "optimizer: {lr: .inf}\n", "c.yaml:2:13: optimizer.lr: should be a finite number, not Infinity"),
        (D + "optimizer: {lr: 1e999}\n", "c.yaml:2:13: optimizer.lr: should be a finite number, not Infinity"),
        (D + "model: {hidden_size: 0}\n", "c.yaml:2:9: model.hidden_size: should be greater than or equal to 1, not 0"),
        (D + "model: {hidden_size: -4}\n", "c.yaml:2:9: model.hidden_size: should be greater than or equal to 1"),
        (D + "model: {bidirectional: no}\n", "c.yaml:2:9: model.bidirectional: should be a valid boolean, not \"no\""),
        (D + "model: {output: adaptive}\n", "c.yaml:2:9: model.output: adaptive has output weights of its own"),
        (D + "model: 3\n", "c.yaml:2:1: model: a section: keys and values belong below it"),
        (D + "name: !!python/object:os.system x\n", "c.yaml:2:7: tag 'tag:yaml.org,2002:python/object:os.system'"),
        (D + "x: &a [1]\ny: [*a, *a]\n", "c.yaml:2:4: anchor &a"),
        (D + "model:\n  <<: {cell: gru}\n", "c.yaml:3:3: a merge key"),
        ("a: " + "[" * 500 + "]" * 500, "c.yaml:1:19: nested more than 16 deep"),
        ("{" * 500, "c.yaml:1:2: a key is a word"),
        (D + "seed: " + "9" * 5000, "c.yaml:2:7: a number of 5000 characters"),
        (D + "name: a\0b\n", "c.yaml:2:8: a control character (U+0000)"),
        (D + "name: a\x1bb\n", "c.yaml:2:8: a control character (U+001B)"),
        (D + "---\n" + D, "c.yaml:2:1: a second document"),
        (D + 'runs_dir: "a\\0b"\n', "c.yaml:2:11: a NUL or half a surrogate pair"),
        (D + 'runs_dir: "\\ud800"\n', "c.yaml:2:11: a NUL or half a surrogate pair"),
        (D + 'name: "\\UFFFFFFFF"\n', "c.yaml"),
        (D + "batching: {max_length: 100000000000000000000}\n", "c.yaml:2:12: batching.max_length: should be less"),
        (D + "tokenizer: {kind: bpe, vocab_size: 50}\n", "c.yaml:2:24: tokenizer.vocab_size: should be 261 or more"),
        (D + "name: ../../x\n", "c.yaml:2:1: name: should be a plain file name"),
        (D + "name: a/b\n", "c.yaml:2:1: name: should be a plain file name"),
        ("data: {train: nowhere.txt}\n", "c.yaml:1:8: data.train: nowhere.txt: no such file"),
        ("data: {train: t.txt, test: '*.nothing'}\n", "c.yaml:1:22: data.test: *.nothing: no such file"),
        ("data: {train: []}\n", "c.yaml:1:8: data.train: should have at least 1 item"),
        ("data: {train: [t.txt, 3]}\n", "c.yaml:1:23: data.train.1: should be a valid string, not 3"),
        ("model: {cell: gru}\n", "c.yaml:1:1: data: missing"),
        ("data: {valid: t.txt}\n", "c.yaml:1:1: data.train: missing"),
        (D + "tokenizer: {kind: file}\n", "c.yaml:2:1: tokenizer.path: goes with tokenizer.kind: file"),
        (D + "tokenizer: {kind: file, path: x.json}\n", "c.yaml:2:25: tokenizer.path: x.json: no such file"),
        (D + "tokenizer: {kind: ids, vocab_size: 5, pad_id: 5}\n", "c.yaml:2:39: tokenizer.pad_id: should be below"),
        ("data: {train: t.txt, format: ids}\n", "c.yaml:1:22: data.format: ids goes with tokenizer.kind: ids"),
        ("data: {train: t.txt, valid: t.txt, valid_fraction: 0.1}\n", "c.yaml:1:36: data.valid_fraction: data.valid"),
        (D + "batching: {mode: stream}\nmodel: {bidirectional: true}\n", "c.yaml:3:9: model.bidirectional: a stream"),
        (D + "training: {patience: 3}\n", "c.yaml:2:12: training.patience: needs a validation set"),
        (D + "training: {loss_weights: {forward: 0}}\n", "c.yaml:2:12: training.loss_weights: all are zero"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_at_its_place(text, fault):
    found = faults(text)
    assert [line for line in found if line.startswith(fault)], found
    assert all("\n" not in line for line in found)


def test_faults_of_all_kinds_come_together():
    text = "data: {train: nowhere.txt}\nmodel: {cel: gru}\nbatching: {random_bptt: true}\n"
    assert len(faults(text, "seed=x", "nonsense", "model.dropout=1")) == 6


def test_a_faulty_required_key_hides_no_other_fault():
    found = faults("name: a/b\ndata: {valid: nowhere.txt}\ntokenizer: {kind: flie, path: x.json}\n")
    keys = [line.split(": ")[1] for line in found]
    assert keys == ["name", "data.train", "tokenizer.kind", "data.valid", "tokenizer.path"]


def test_very_many_faults_are_told_in_part_and_in_time():
    found = faults(D + "".join(f"key{n}: 1\n" for n in range(20000)))
    assert len(found) == 51
    assert found[-1] == "c.yaml: 19950 more faults"


def test_two_directions_in_a_stream_are_refused():
    found = faults(D + "batching: {mode: stream}\nmodel: {bidirectional: true}\n")
    assert len(found) == 1
    assert "c.yaml:3:9: model.bidirectional: a stream has no right end" in found[0]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.hidden_size", "command line: 'model.hidden_size': an override is KEY=VALUE"),
        ("=3", "command line: '=3': an override is KEY=VALUE"),
        ("model.hiden_size=3", "command line: model.hiden_size: no such key (did you mean 'hidden_size'?)"),
        ("modle.cell=gru", "command line: modle: no such key (did you mean 'model'?)"),
        ("model.cell.x=gru", "command line: model.cell: should be"),
        ("seed.x=3", "command line: seed.x: seed is not a section"),
        ("model.cell=[", "command line: model.cell=:1:2:"),
        ("seed=9.5", "command line: seed: should be a valid integer, not 9.5"),
    ],
)
def test_a_faulty_override_is_named(override, fault):
    assert faults(D + "seed: 3\n", override)[0].startswith(fault)


def test_precedence_is_defaults_then_file_then_command_line():
    config = load(D + "model: {hidden_size: 7, cell: gru}\noptimizer:\n", "model.hidden_size=9", "optimizer.lr=1e-2")
    assert (config.model.num_layers, config.model.cell, config.model.hidden_size) == (2, "gru", 9)
    assert (config.optimizer.lr, config.name, config.data.train) == (0.01, "c", ["t.txt"])


@pytest.mark.parametrize("value", ["1e-3", "1.0e-3", ".001", "0.001", "+1e-03"])
def test_numbers_are_numbers(value):
    assert load(D + f"optimizer: {{lr: {value}}}").optimizer.lr == 0.001


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_loads(path, monkeypatch):
    assert {"quickstart", "sample_ids"} < {each.stem for each in TEMPLATES}
    monkeypatch.chdir(ROOT)
    load_config(path, check_files=path.parent.name != "recipes" or SHARED.is_dir())  # their corpora stand elsewhere
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


SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(
            st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/."), min_size=1, max_size=9
        ),
        "seed": st.integers(0, 2**63 - 1),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-30, 1e30), "weight_decay": st.just(0)}),
        "model": st.fixed_dictionaries({"cell": st.sampled_from(["lstm", "gru"]), "bidirectional": st.booleans()}),
        "logging": st.fixed_dictionaries(
            {"sample_prompts": st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"])))}
        ),
    },
)


@settings(max_examples=150, deadline=None)
@given(tree=SECTIONS)
def test_dumped_and_loaded_it_is_the_same(tree):
    config = Config.model_validate({"name": "x", "data": {"train": ["t.txt"]}} | tree)
    text = dump_config(config)
    assert load(text) == config
    assert yaml.safe_load(text)["seed"] == config.seed  # other programs read it alike
    assert yaml.safe_load(text)["name"] == config.name


@settings(max_examples=300, deadline=1000)
@given(st.one_of(st.binary(max_size=200), st.text("{}[]:,-?&*!|>'\"%@`#\n\t ab<1.e", max_size=80).map(str.encode)))
def test_any_bytes_are_a_config_or_a_config_error(data):
    with open("c.yaml", "wb") as handle:
        handle.write(data)
    with contextlib.suppress(ConfigError):
        load_config("c.yaml")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_is_none(name):
    with pytest.raises(ConfigError, match=r"no such file|is a directory"):
        load_config(name)


def test_too_large_and_not_utf_8(directory):
    (directory / "big.yaml").write_text("#" * (1 << 20) + "\n")
    (directory / "latin.yaml").write_bytes(D.encode() + b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"big\.yaml: over 1 MiB"):
        load_config("big.yaml")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2:10: byte 30 is not UTF-8"):
        load_config("latin.yaml")


def test_the_readme_s_table_is_the_schema_s():
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
    assert all(description.endswith(".") for _, description in itertools.islice(explained, 3))
