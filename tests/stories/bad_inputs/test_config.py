"""Configuration files that can't be used: every fault at its place, exit 2."""

import shlex

import pytest

from tests.stories.bad_inputs.table import Row, fifo, folder, link, sparse, text

D = "data: {train: t.txt}\n"
CONTENTS = {
    "empty": ("", "c.yaml:1:1: empty; start from configs/quickstart.yaml"),
    "comment alone": ("# nothing\n", "c.yaml:1:1: empty; start from configs/quickstart.yaml"),
    "null": ("null\n", "c.yaml:1:1: empty; start from configs/quickstart.yaml"),
    "a list": ("- a\n", "c.yaml:1:1: not a mapping of keys to values; start from configs/quickstart.yaml"),
    "a word": ("hello\n", "c.yaml:1:1: not a mapping of keys to values; start from configs/quickstart.yaml"),
    "tab indent": (
        "data:\n\ttrain: t.txt\n",
        "c.yaml:2:1: {words} (indent with spaces)",
    ),
    "unclosed bracket": (D + "model: {cell: gru\n", "c.yaml:3:1: {words}"),
    "no colon": (D + "seed 3\n", "c.yaml:3:1: {words}"),
    "the same key again": (
        D + "data: {train: t.txt}\n",
        "c.yaml:2:1: data: the key stands twice (first at c.yaml:1:1)",
    ),
    "the same key again below": (
        D + "model: {cell: gru, cell: rnn}",
        "c.yaml:2:20: model.cell: the key stands twice (first at c.yaml:2:9)",
    ),
    "unknown key": (D + "layers: 3\n", "c.yaml:2:1: layers: no such key"),
    "misspelt key": (
        D + "model:\n  hiden_size: 3\n",
        "c.yaml:3:3: model.hiden_size: no such key (did you mean 'hidden_size'?)",
    ),
    "key of another section": (
        D + "hidden_size: 3\n",
        "c.yaml:2:1: hidden_size: no such key (did you mean 'model.hidden_size'?)",
    ),
    "yes is a word": (D + "yes: no\n", "c.yaml:2:1: yes: no such key"),
    "no is a word": (
        D + "model: {bidirectional: no}\n",
        'c.yaml:2:9: model.bidirectional: {words}, not "no"',
    ),
    "text for a number": (
        D + "optimizer: {lr: fast}\n",
        'c.yaml:2:13: optimizer.lr: {words}, not "fast"',
    ),
    "quoted number": (
        D + 'optimizer: {lr: "1e-3"}\n',
        'c.yaml:2:13: optimizer.lr: {words}, not "1e-3"',
    ),
    "true for an integer": (D + "seed: true\n", "c.yaml:2:1: seed: {words}, not true"),
    "true for a number": (
        D + "optimizer: {lr: true}\n",
        "c.yaml:2:13: optimizer.lr: {words}, not true",
    ),
    "fraction for an integer": (D + "seed: 1.5\n", "c.yaml:2:1: seed: {words}, not 1.5"),
    "NaN": (D + "optimizer: {lr: .nan}\n", "c.yaml:2:13: optimizer.lr: {words}, not NaN"),
    "infinity": (D + "optimizer: {lr: .inf}\n", "c.yaml:2:13: optimizer.lr: {words}, not Infinity"),
    "beyond a float": (
        D + "optimizer: {lr: 1e999}\n",
        "c.yaml:2:13: optimizer.lr: {words}, not Infinity",
    ),
    "size zero": (
        D + "model: {hidden_size: 0}\n",
        "c.yaml:2:9: model.hidden_size: {words} 1, not 0",
    ),
    "size negative": (
        D + "model: {hidden_size: -4}\n",
        "c.yaml:2:9: model.hidden_size: {words} 1, not -4",
    ),
    "size beyond memory": (
        D + "model: {embedding_size: 1000000}\n",
        "c.yaml:2:9: model.embedding_size: {words} 65536, not 1000000",
    ),
    "length beyond 64 bits": (
        D + "batching: {max_length: 100000000000000000000}\n",
        ("c.yaml:2:12: batching.max_length: {words} 2147483648, not 100000000000000000000"),
    ),
    "no vocabulary": (
        D + "tokenizer: {vocab_size: 0}\n",
        "c.yaml:2:13: tokenizer.vocab_size: {words} 1, not 0",
    ),
    "dropout of everything": (D + "model: {dropout: 1}\n", "c.yaml:2:9: model.dropout: {words} 1, not 1"),
    "section that is a number": (D + "model: 3\n", "c.yaml:2:1: model: a section: keys and values belong below it"),
    "misspelt word": (
        D + "model: {cell: lsmt}\n",
        ("c.yaml:2:9: model.cell: {words}, not \"lsmt\" (did you mean 'lstm'?)"),
    ),
    "adaptive with tied weights": (
        D + "model: {output: adaptive}\n",
        ("c.yaml:2:9: model.output: adaptive has output weights of its own; set model.tie_weights: false"),
    ),
    "bpe smaller than bytes": (
        D + "tokenizer: {kind: bpe, vocab_size: 50}\n",
        ("c.yaml:2:24: tokenizer.vocab_size: should be 261 or more: 256 bytes, 4 special tokens and a piece"),
    ),
    "tag that runs a command": (
        D + "name: !!python/object/apply:os.system [touch hacked]\n",
        ("c.yaml:2:7: tag 'tag:yaml.org,2002:python/object/apply:os.system'; values have no tags here"),
    ),
    "tag of an object": (
        D + "name: !!python/object:os.system x\n",
        "c.yaml:2:7: tag 'tag:yaml.org,2002:python/object:os.system'; values have no tags here",
    ),
    "anchors": (
        D + "x: &a [1]\ny: [*a, *a]\n",
        (
            "c.yaml:2:4: anchor &a; write the value out where it is used\n"
            "c.yaml:3:5: alias *a; write the value out\n"
            "c.yaml:3:9: alias *a; write the value out"
        ),
    ),
    "merge key": (D + "model:\n  <<: {cell: gru}\n", "c.yaml:3:3: a merge key; write the values out"),
    "brackets 500 deep": ("a: " + "[" * 500 + "]" * 500, "c.yaml:1:19: nested more than 16 deep"),
    "braces 500 deep": ("{" * 500, "c.yaml:1:2: a key is a word, not a list or mapping"),
    "indent 500 deep": (
        "\n".join(" " * depth + "a:" for depth in range(500)),
        "c.yaml:17:17: nested more than 16 deep",
    ),
    "a 5,000-digit integer": (D + "seed: " + "9" * 5000, "c.yaml:2:7: a number of 5000 characters"),
    "NUL": (D + "name: a\0b\n", "c.yaml:2:8: a control character (U+0000); remove it"),
    "ESC": (D + "name: a\x1bb\n", "c.yaml:2:8: a control character (U+001B); remove it"),
    "DEL": (D + "name: a\x7fb\n", "c.yaml:2:8: a control character (U+007F); remove it"),
    "bad UTF-8": (
        D.encode() + b"name: caf\xe9\n",
        "c.yaml:2:10: byte 30 is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)",
    ),
    "UTF-16": (
        (D + "seed: 3\n").encode("utf-16"),
        "c.yaml:1:1: byte 0 is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)",
    ),
    "half a surrogate pair": (
        D.encode() + b"name: \xed\xa0\x80\n",
        "c.yaml:2:7: byte 27 is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)",
    ),
    "escaped NUL": (D + 'runs_dir: "a\\0b"\n', "c.yaml:2:11: a NUL or half a surrogate pair in a text"),
    "escaped surrogate": (D + 'runs_dir: "\\ud800"\n', "c.yaml:2:11: a NUL or half a surrogate pair in a text"),
    "escape beyond Unicode": (D + 'name: "\\UFFFFFFFF"\n', "c.yaml:2:8: an escape beyond Unicode (\\UFFFFFFFF)"),
    "escaped ESC in a key": (D + '"\\e[2J": 1\n', "c.yaml:2:1: \\x1b[2J: no such key"),
    "escaped newline in a key": (D + '"a\\nb": 1\n', "c.yaml:2:1: a\\x0ab: no such key"),
    "escaped newline in a word": (
        D + 'model: {cell: "a\\nb"}\n',
        'c.yaml:2:9: model.cell: {words}, not "a\\nb"',
    ),
    "over 1 MiB": ("#" * (1 << 20) + "\n", "c.yaml: over 1 MiB; is this a configuration file?"),
    "two documents": (D + "---\n" + D, "c.yaml:2:1: a second document; a configuration file holds one"),
    "path as a name": (
        D + "name: ../../x\n",
        "c.yaml:2:1: name: should be a plain file name, without a slash or a leading dot",
    ),
    "hidden name": (
        D + "name: .git\n",
        "c.yaml:2:1: name: should be a plain file name, without a slash or a leading dot",
    ),
    "no name": (D + 'name: ""\n', "c.yaml:2:1: name: should be a plain file name, without a slash or a leading dot"),
    "control character in a name": (
        D + 'name: "a\\e[2J"\n',
        "c.yaml:2:1: name: should be a plain file name, without a slash or a leading dot",
    ),
    "name too long": (
        D + f"name: {'x' * 201}\n",
        ('c.yaml:2:1: name: {words} 200 {words}, not "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'),
    ),
    "no data": ("model: {cell: gru}\n", "c.yaml:1:1: data: missing; it has no default"),
    "no training text": ("data: {valid: t.txt}\n", "c.yaml:1:1: data.train: missing; it has no default"),
    "no training file": (
        "data: {train: []}\n",
        "c.yaml:1:8: data.train: {words}, not []",
    ),
    "number for a file": ("data: {train: [t.txt, 3]}\n", "c.yaml:1:23: data.train.1: {words}, not 3"),
    "null for a file": ("data: {train: null}\n", "c.yaml:1:8: data.train: {words}, not null"),
    "training text that is not there": (
        "data: {train: nowhere.txt}\n",
        "c.yaml:1:8: data.train: nowhere.txt: no such file (paths are relative to {here})",
    ),
    "a second text that is not there": (
        "data:\n  train:\n  - t.txt\n  - nowhere.txt\n",
        "c.yaml:4:5: data.train.1: nowhere.txt: no such file (paths are relative to {here})",
    ),
    "validation text that is not there": (
        "data: {train: t.txt, valid: nowhere.txt}\n",
        "c.yaml:1:22: data.valid: nowhere.txt: no such file (paths are relative to {here})",
    ),
    "test glob without a match": (
        "data: {train: t.txt, test: '*.nothing'}\n",
        "c.yaml:1:22: data.test: *.nothing: no such file (paths are relative to {here})",
    ),
    "path with ESC": (
        'data: {train: "no\\ewhere"}\n',
        "c.yaml:1:8: data.train: no\\x1bwhere: no such file (paths are relative to {here})",
    ),
    "path with a newline": (
        'data: {train: "no\\nwhere"}\n',
        "c.yaml:1:8: data.train: no\\x0awhere: no such file (paths are relative to {here})",
    ),
    "tokenizer file that is not there": (
        D + "tokenizer: {kind: file, path: x.json}\n",
        "c.yaml:2:25: tokenizer.path: x.json: no such file",
    ),
    "tokenizer file that is a directory": (
        D + "tokenizer: {kind: file, path: .}\n",
        "c.yaml:2:25: tokenizer.path: .: not a regular file",
    ),
    "tokenizer file that is a device": (
        D + "tokenizer: {kind: file, path: /dev/zero}\n",
        "c.yaml:2:25: tokenizer.path: /dev/zero: not a regular file",
    ),
    "no tokenizer file": (
        D + "tokenizer: {kind: file}\n",
        "c.yaml:2:1: tokenizer.path: goes with tokenizer.kind: file, and only with it",
    ),
    "tokenizer file of another kind": (
        D + "tokenizer: {kind: word, path: t.txt}\n",
        "c.yaml:2:25: tokenizer.path: goes with tokenizer.kind: file, and only with it",
    ),
    "pad id beyond the vocabulary": (
        D + "tokenizer: {kind: ids, vocab_size: 5, pad_id: 5}\n",
        "c.yaml:2:39: tokenizer.pad_id: should be below tokenizer.vocab_size (5)",
    ),
    "ids without their tokenizer": (
        "data: {train: t.txt, format: ids}\n",
        "c.yaml:1:22: data.format: ids goes with tokenizer.kind: ids",
    ),
    "ids out of jsonl": (
        "data: {train: t.txt, format: jsonl}\ntokenizer: {kind: ids}\n",
        "c.yaml:1:22: data.format: tokenizer.kind: ids reads lines of integers; use ids or auto",
    ),
    "two validation sets": (
        "data: {train: t.txt, valid: t.txt, valid_fraction: 0.1}\n",
        ("c.yaml:1:36: data.valid_fraction: data.valid names the validation set already; set one of the two to null"),
    ),
    "two directions in a stream": (
        D + "batching: {mode: stream}\nmodel: {bidirectional: true}\n",
        (
            "c.yaml:3:9: model.bidirectional: a stream has no right end; use "
            "batching.mode: sentences without carry_state"
        ),
    ),
    "two directions in lines that follow each other": (
        D + "batching: {carry_state: true}\nmodel: {bidirectional: true}\n",
        (
            "c.yaml:3:9: model.bidirectional: a text whose lines follow each other has no right end; use "
            "batching.mode: sentences without carry_state"
        ),
    ),
    "random spans without a stream": (
        D + "batching: {random_bptt: true}\n",
        "c.yaml:2:12: batching.random_bptt: goes with batching.mode: stream",
    ),
    "patience without validation": (
        D + "training: {patience: 3}\n",
        ("c.yaml:2:12: training.patience: needs a validation set: set data.valid or data.valid_fraction"),
    ),
    "nothing to learn": (
        D + "training: {loss_weights: {forward: 0}}\n",
        "c.yaml:2:12: training.loss_weights: all are zero, so the model would learn nothing",
    ),
    "an order twice": (
        D + "model: {ngram_embeddings: [2, 2]}\n",
        "c.yaml:2:9: model.ngram_embeddings: names an order twice",
    ),
    "an alias for a key": (D + "*a : [1]\n", "c.yaml:2:1: alias *a; write the value out"),
    "adaptive and smoothed": (
        D + "model: {output: adaptive, tie_weights: false}\nregularization: {label_smoothing: 0.1}\n",
        (
            "c.yaml:3:18: regularization.label_smoothing: spreads targets over a full output layer; "
            "set model.output: full"
        ),
    ),
    "faults of all kinds": (
        "data: {train: nowhere.txt}\nmodel: {cel: gru}\nbatching: {random_bptt: true}\nseed: x\n",
        (
            "c.yaml:2:9: model.cel: no such key (did you mean 'cell'?)\n"
            'c.yaml:4:1: seed: {words}, not "x"\n'
            "c.yaml:3:12: batching.random_bptt: goes with batching.mode: stream\n"
            "c.yaml:1:8: data.train: nowhere.txt: no such file (paths are relative to {here})"
        ),
    ),
    "a faulty required key": (
        "name: a/b\ndata: {valid: nowhere.txt}\ntokenizer: {kind: flie, path: x.json}\n",
        (
            "c.yaml:1:1: name: should be a plain file name, without a slash or a leading dot\n"
            "c.yaml:2:1: data.train: missing; it has no default\n"
            "c.yaml:3:13: tokenizer.kind: {words}, not \"flie\" (did you mean 'file'?)\n"
            "c.yaml:2:8: data.valid: nowhere.txt: no such file (paths are relative to {here})\n"
            "c.yaml:3:25: tokenizer.path: x.json: no such file"
        ),
    ),
    "a faulty kind beside a tokenizer that is a directory": (
        D + "tokenizer: {kind: flie, path: .}\n",
        (
            "c.yaml:2:13: tokenizer.kind: {words}, not \"flie\" (did you mean 'file'?)\n"
            "c.yaml:2:25: tokenizer.path: .: not a regular file"
        ),
    ),
    "twenty thousand unknown keys": (
        D + "".join(f"key{n}: 1\n" for n in range(20_000)),
        "c.yaml:4998:10: too long; is this a configuration file?",
    ),
    "a hundred thousand wrong items": (
        "data:\n  train:\n" + "  - 3\n" * 100_000,
        "c.yaml:9997:5: too long; is this a configuration file?",
    ),
    "a mebibyte of brackets": ("[" * ((1 << 20) - 1), "c.yaml:1:17: nested more than 16 deep"),
    "aliases that multiply": (
        "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(2)),
        (
            "c.yaml:1:4: anchor &a; write the value out where it is used\n"
            "c.yaml:2:5: anchor &b0; write the value out where it is used\n"
            "c.yaml:2:10: alias *a; write the value out\n"
            "c.yaml:2:14: alias *a; write the value out\n"
            "c.yaml:3:5: anchor &b1; write the value out where it is used\n"
            "c.yaml:3:10: alias *a; write the value out\n"
            "c.yaml:3:14: alias *a; write the value out"
        ),
    ),
}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("name", CONTENTS)
def test_what_a_config_can_not_say(desk, judge, command, name):
    content, said = CONTENTS[name]
    text("t.txt", "a b\n")()
    text("c.yaml", content)()
    judge(f"{command} c.yaml", said, 2)


FILES = {
    "missing": Row("nowhere.yaml", "nowhere.yaml: {words}", 2),
    "FIFO": Row("pipe.yaml", "pipe.yaml: not a regular file", 2, fifo("pipe.yaml")),
    "device": Row("/dev/zero", "/dev/zero: not a regular file", 2),
    "dangling link": Row("link.yaml", "link.yaml: {words}", 2, link("link.yaml", "nowhere")),
    "link to itself": Row("link.yaml", "link.yaml: {words}", 2, link("link.yaml", "link.yaml")),
    "below a file": Row("c.yaml/c.yaml", "c.yaml/c.yaml: {words}", 2),
    "a terabyte": Row(
        "huge.yaml", "huge.yaml: over 1 MiB; is this a configuration file?", 2, sparse("huge.yaml", 1 << 40)
    ),
    "name too long": Row(
        "x" * 300,
        (
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx: {words}"
        ),
        2,
    ),
    "ESC in its name": Row("'no\x1b[2Jwhere.yaml'", "no\\x1b[2Jwhere.yaml: {words}", 2),
    "newline in its name": Row("'no\nwhere.yaml'", "no\\x0awhere.yaml: {words}", 2),
    "fault in a file with a newline in its name": Row(
        "'a\nb.yaml'",
        (
            "a\\x0ab.yaml:1:1: name: should be a plain file name, without a slash or a leading dot\n"
            'a\\x0ab.yaml:1:1: seed: {words}, not "x"\n'
            "a\\x0ab.yaml:1:1: data: missing; it has no default"
        ),
        2,
        text("a\nb.yaml", "seed: x\n"),
    ),
    "name that can't name a run": Row(
        ".yaml",
        ".yaml:1:1: name: should be a plain file name, without a slash or a leading dot",
        2,
        text(".yaml", "data: {train: train.txt}\n"),
    ),
}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_config_file(desk, judge, command, name):
    row = FILES[name]
    row.make()
    judge(f"{command} {row.command}", row.said, row.code)


def test_a_folder_is_no_config(desk, judge):
    folder("folder")()
    judge("train folder", "folder: {words}", 2)
    judge("check folder", "folder: not a run directory (no config.yaml in it)", 4)


OLD_KEYS = """\
data:
  train: train.txt
  jsonl_field: x
model:
  counts: 5
  ngrams: [2, 3]
  ngram_buckets: 64
regularization: {word_dropout: 0.1, ngram_dropout: 0.1}
optimizer:
  muon_rate: 2.5
  ngram_rate: 1.0
seed: x
"""
RENAMED = {  # where each stands in the text above, its old and its new name
    "3:3": ("data.jsonl_field=x", "data.jsonl_field: renamed to data.field"),
    "5:3": ("model.counts=5", "model.counts: renamed to model.ngram_counts"),
    "6:3": ("model.ngrams=[2,3]", "model.ngrams: renamed to model.ngram_embeddings"),
    "7:3": ("model.ngram_buckets=64", "model.ngram_buckets: renamed to model.ngram_embedding_buckets"),
    "8:18": (
        "regularization.word_dropout=0.1",
        "regularization.word_dropout: renamed to regularization.embedding_dropout",
    ),
    "8:37": (
        "regularization.ngram_dropout=0.1",
        "regularization.ngram_dropout: renamed to regularization.ngram_embedding_dropout",
    ),
    "10:3": ("optimizer.muon_rate=2.5", "optimizer.muon_rate: renamed to optimizer.muon_lr_scale"),
    "11:3": ("optimizer.ngram_rate=1.0", "optimizer.ngram_rate: renamed to optimizer.ngram_lr_scale"),
}


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_old_keys_of_a_file_are_refused_with_their_new_names_all_at_once(desk, judge, command):
    text("c.yaml", OLD_KEYS)()
    faults = [f"c.yaml:{place}: {said}" for place, (_, said) in RENAMED.items()]
    judge(f"{command} c.yaml", "\n".join([*faults, 'c.yaml:12:1: seed: {words}, not "x"']), 2)


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_old_keys_of_overrides_are_refused_with_their_new_names(desk, judge, command):
    overrides = " ".join(override for override, _ in RENAMED.values())
    judge(f"{command} c.yaml {overrides}", "\n".join(f"command line: {said}" for _, said in RENAMED.values()), 2)


OVERRIDES = {
    "no value": (
        "model.hidden_size",
        ("command line: 'model.hidden_size': an override is KEY=VALUE, for instance model.hidden_size=256"),
    ),
    "no key": ("=3", "command line: '=3': an override is KEY=VALUE, for instance model.hidden_size=256"),
    "empty part": (
        "model..cell=gru",
        ("command line: 'model..cell=gru': an override is KEY=VALUE, for instance model.hidden_size=256"),
    ),
    "unknown key": ("model.hiden_size=3", "command line: model.hiden_size: no such key (did you mean 'hidden_size'?)"),
    "unknown section": ("modle.cell=gru", "command line: modle: no such key (did you mean 'model'?)"),
    "below a word": (
        "model.cell.x=gru",
        'command line: model.cell: {words}, not {"x": "gru"}',
    ),
    "below a number of the file": (
        "schedule.warmup_steps.x=3",
        "command line: schedule.warmup_steps.x: schedule.warmup_steps is not a section",
    ),
    "below a list": ("data.train.0=x", "command line: data.train.0: data.train is not a section"),
    "unclosed bracket": (
        "model.cell=[",
        "command line: model.cell=:1:2: {words}",
    ),
    "fraction for an integer": ("seed=9.5", "command line: seed: {words}, not 9.5"),
    "nothing for an integer": ("seed=", "command line: seed: {words}, not null"),
    "text for a section": ("model=gru", "command line: model: a section: keys and values belong below it"),
    "tag that runs a command": (
        "name=!!python/object/apply:os.system [touch hacked]",
        ("command line: name=:1:1: tag 'tag:yaml.org,2002:python/object/apply:os.system'; values have no tags here"),
    ),
    "brackets 500 deep": ("seed=" + "[" * 500, "command line: seed=:1:17: nested more than 16 deep"),
    "two documents": ("seed=3\n---\n4", "command line: seed=:2:1: a second document; a configuration file holds one"),
    "newline in a key": ("se\ned=3", "command line: se\\x0aed: no such key (did you mean 'seed'?)"),
    "ESC in a key": ("se\x1bed=3", "command line: se\\x1bed: no such key (did you mean 'seed'?)"),
    "ESC in a value": ("name=a\x1b[2Jb", "command line: name=:1:2: a control character (U+001B); remove it"),
    "path that is not there": (
        "data.train=nowhere.txt",
        "command line: data.train: nowhere.txt: no such file (paths are relative to {here})",
    ),
}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_what_an_override_can_not_say(desk, judge, command, name):
    override, said = OVERRIDES[name]
    judge(f"{command} c.yaml {shlex.quote(override)}", said, 2)


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_faults_of_all_overrides_come_together(desk, judge, command):
    judge(
        f"{command} c.yaml seed=x nonsense model.dropout=1 data.test=nowhere.txt",
        "command line: 'nonsense': an override is KEY=VALUE, for instance model.hidden_size=256\n"
        'command line: seed: {words}, not "x"\n'
        "command line: model.dropout: {words} 1, not 1\n"
        "command line: data.test: nowhere.txt: no such file (paths are relative to {here})",
        2,
    )
