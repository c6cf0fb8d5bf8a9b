"""Damaged, foreign or hostile runs and tokenizer files: the message names them, exit code 4, nothing is executed."""

import base64
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

import lmtrain
from lmtrain.runs import checkpoint
from tests.conftest import NO_FILE
from tests.stories.bad_inputs.table import text

STEP = Path("run/checkpoints/step-00000003")
WEIGHTS, TRAINING, STATE = STEP / "model.safetensors", STEP / "training.safetensors", STEP / "state.json"
PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch hacked\x85R."
COMMANDS = {
    "generate": "generate run",
    "evaluate": "evaluate run valid.txt",
    "score": "score run valid.txt",
    "fill": "fill run 'a ____'",
    "embed": "embed run valid.txt -o new.npz",
    "export": "export run -o new",
    "export weights": "export run -o new --format safetensors",
}
RESUME = "train c.yaml training.max_steps=3 --run-dir run --resume"


def edit(path, **changes):
    """Change values of a JSON object in a file; None removes a key."""
    stored = json.loads(Path(path).read_text()) | changes
    text(path, json.dumps({key: value for key, value in stored.items() if value is not None}))()


def reseal(**changes):
    """Write a manifest with these values and a correct seal, as an attacker would."""
    manifest = json.loads((STEP / "manifest.json").read_text()) | changes
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(
        (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    ).hexdigest()
    text(STEP / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")()


def forge(path, content):
    """Replace a file of a checkpoint, and write a manifest that fits it."""
    text(path, content)()
    files = json.loads((STEP / "manifest.json").read_text())["files"]
    files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(files=files)


def reword(change):
    """Change the list of words in the tokenizer of the run."""
    edit("run/tokenizer.json", tokens=change(json.loads(Path("run/tokenizer.json").read_text())["tokens"]))


def reconfigure(old, new):
    path = Path("run/config.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def save_again(change):
    """Change tensors or state of the checkpoint, and save it as lmtrain would."""
    saved = checkpoint.load(Path("run/checkpoints"), 3)
    change(saved)
    checkpoint.save(Path("run/checkpoints"), saved)


def replace_by(path, make):
    """Replace a file by what `make` makes there."""

    def damage():
        Path(path).unlink()
        make(path)

    return damage


def aside(path):
    os.rename(path, "aside")
    os.symlink(os.path.abspath("aside"), path)


def cut(path, size):
    return lambda: os.truncate(path, size)


def flip(path):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    Path(path).write_bytes(data)


def grow(path, size):
    return lambda: os.truncate(path, size)


def header(**tensors):
    """Return a safetensors file that consists of a header only."""
    packed = json.dumps(tensors).encode()
    return struct.pack("<Q", len(packed)) + packed


def library(**changes):
    """Return a tokenizer.json of the tokenizers library, with changes."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    plain = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **plain, "model": model, **changes}


def theirs(**changes):
    """Write such a tokenizer in place of the run's."""
    return text("run/tokenizer.json", json.dumps({"format": 1, "kind": "file", "tokenizer": library(**changes)}))


def set_nan(saved):
    saved.model["embedding.weight"][0, 0] = float("nan")


def name_of_a_path(name):
    return lambda: reseal(files={name: {"bytes": 1, "sha256": ""}})


# these make the library panic: a map that can't be read, and a prefix longer than the tokens
PANICS = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"ab").decode()}
PREFIXED = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "xxxx"}

READING = "reading train.txt\nreading valid.txt\n"
UNUSABLE = "; no checkpoint can be used: restore the run from a backup, or train a new one"
OTHER_TOKENIZER = f"{STEP}: was trained with another tokenizer than the run's tokenizer.json{UNUSABLE}"


def misfit(tensor, found, needed):
    return f"{WEIGHTS}: tensor {tensor!r} is {found}, the run's config and tokenizer need {needed}{UNUSABLE}"


# what is damaged, stderr of every command that uses a run, and stderr of `train --resume` if that differs;
# {words} stands for the words of a library
DAMAGES = {
    "no config": (
        lambda: Path("run/config.yaml").unlink(),
        "run: not a run directory (no config.yaml in it)",
        "--run-dir run: not empty; nothing is overwritten: name another",
    ),
    "empty config": (cut("run/config.yaml", 0), "run/config.yaml:1:1: empty; start from configs/quickstart.yaml"),
    "config of an unknown cell": (
        lambda: reconfigure("cell: lstm", "cell: lsmt"),
        "run/config.yaml:35:3: model.cell: should be 'lstm', 'gru' or 'rnn', not \"lsmt\" (did you mean 'lstm'?)",
    ),
    "config of a later version": (
        lambda: reconfigure("cell: lstm", "cell: lstm\n  attention: true"),
        "run/config.yaml:36:3: model.attention: no such key",
    ),
    "config of another size": (
        lambda: reconfigure("hidden_size: 8", "hidden_size: 7"),
        misfit("recurrence.stacks.0.layers.0.weight_ih_l0", "(32, 6) F32", "(28, 6) F32"),
        "model.hidden_size: the run was begun with 7, not 8; it can't change in a resume",
    ),
    "config of a huge size": (
        lambda: reconfigure("hidden_size: 8", "hidden_size: 65536"),
        misfit("recurrence.stacks.0.layers.0.weight_ih_l0", "(32, 6) F32", "(262144, 6) F32"),
        "model.hidden_size: the run was begun with 65536, not 8; it can't change in a resume",
    ),
    "config that is a FIFO": (
        replace_by("run/config.yaml", os.mkfifo),
        "run/config.yaml: not a regular file; a run directory holds nothing else",
    ),
    "config that is a link": (
        lambda: aside("run/config.yaml"),
        "run/config.yaml: not a regular file; a run directory holds nothing else",
    ),
    "config of a terabyte": (
        grow("run/config.yaml", 1 << 40),
        "run/config.yaml: over 1 MiB; is this a configuration file?",
    ),
    "no tokenizer": (lambda: Path("run/tokenizer.json").unlink(), f"run/tokenizer.json: {NO_FILE}"),
    "tokenizer cut short": (cut("run/tokenizer.json", 50), "run/tokenizer.json: not a tokenizer file: {words}"),
    "tokenizer that is a pickle": (text("run/tokenizer.json", PICKLE), "run/tokenizer.json: damaged: not UTF-8"),
    "tokenizer 100,000 deep": (
        text("run/tokenizer.json", "[" * 100_000),
        "run/tokenizer.json: not a tokenizer file: {words}",
    ),
    "tokenizer that is a FIFO": (
        replace_by("run/tokenizer.json", os.mkfifo),
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
    ),
    "tokenizer that is a directory": (
        replace_by("run/tokenizer.json", os.mkdir),
        "run/tokenizer.json: not a regular file",
    ),
    "tokenizer that is a link": (
        lambda: aside("run/tokenizer.json"),
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
    ),
    "tokenizer of a terabyte": (
        grow("run/tokenizer.json", 1 << 40),
        "run/tokenizer.json: 1,099,511,627,776 bytes; such a file has at most 268,435,456",
    ),
    "tokenizer of a newer format": (
        lambda: edit("run/tokenizer.json", format=9),
        "run/tokenizer.json: format 9 is newer than this lmtrain's; upgrade lmtrain",
    ),
    "tokenizer of another kind": (
        lambda: edit("run/tokenizer.json", kind="magic\x1b[2J\n"),
        "run/tokenizer.json: unknown tokenizer kind 'magic\\x1b[2J\\n'",
    ),
    "tokenizer without words": (
        lambda: edit("run/tokenizer.json", tokens=None),
        "run/tokenizer.json: not a tokenizer file: 'tokens'",
    ),
    "tokenizer with a word less": (
        lambda: reword(lambda words: words[:-1]),
        misfit("embedding.weight", "(12, 6) F32", "(11, 6) F32"),
        READING + misfit("embedding.weight", "(12, 6) F32", "(11, 6) F32"),
    ),
    "tokenizer with a word twice": (
        lambda: reword(lambda words: [*words[:-1], words[0]]),
        "run/tokenizer.json: the vocabulary names a token twice",
    ),
    "tokenizer with a pair of characters": (
        lambda: edit("run/tokenizer.json", kind="char", tokens=["ab"]),
        "run/tokenizer.json: a character vocabulary holds single characters only",
    ),
    "tokenizer with words in another order": (
        lambda: reword(lambda words: words[::-1]),
        OTHER_TOKENIZER,
        READING + OTHER_TOKENIZER,
    ),
    "tokenizer with half a surrogate pair": (
        lambda: reword(lambda words: [*words[:-1], "\ud800"]),
        "run/tokenizer.json: not a tokenizer file: {words}",
    ),
    "tokenizer of a huge vocabulary": (
        text("run/tokenizer.json", '{"format": 1, "kind": "ids", "ids": 1000000000000, "pad_id": 0}'),
        "run/tokenizer.json: 1000000000000 ids with pad id 0",
    ),
    "tokenizer that makes its library panic": (
        theirs(normalizer=PANICS),
        "run/tokenizer.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "tokenizer that makes its library panic in its model": (
        theirs(model=PREFIXED),
        "run/tokenizer.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "tokenizer with a gap in its ids": (
        theirs(model={"type": "WordLevel", "vocab": {"a": 0, "b": 2}, "unk_token": "a"}),
        "run/tokenizer.json: the vocabulary's ids have gaps",
    ),
    "tokenizer with a broken pattern": (
        theirs(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "run/tokenizer.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "no checkpoint": (lambda: shutil.rmtree(STEP), f"{STEP}/manifest.json: {NO_FILE}{UNUSABLE}"),
    "empty checkpoint": (
        lambda: [shutil.rmtree(STEP), STEP.mkdir()],
        f"{STEP}/manifest.json: {NO_FILE}{UNUSABLE}",
    ),
    "checkpoint that is a file": (
        lambda: [shutil.rmtree(STEP), STEP.touch()],
        f"{STEP}/manifest.json: not a directory{UNUSABLE}",
    ),
    "checkpoint that is a link": (
        lambda: aside(STEP),
        f"{STEP}: not a regular file; a run directory holds nothing else",
    ),
    "no manifest": (
        lambda: (STEP / "manifest.json").unlink(),
        f"{STEP}/manifest.json: {NO_FILE}{UNUSABLE}",
    ),
    "manifest cut short": (cut(STEP / "manifest.json", 100), f"{STEP}/manifest.json: damaged: not JSON{UNUSABLE}"),
    "manifest of a flipped bit": (
        lambda: flip(STEP / "manifest.json"),
        f"{STEP}/manifest.json: damaged: not the bytes that were saved{UNUSABLE}",
    ),
    "manifest that is a list": (
        text(STEP / "manifest.json", "[]"),
        f"{STEP}/manifest.json: damaged: not a JSON object{UNUSABLE}",
    ),
    "manifest 100,000 deep": (
        text(STEP / "manifest.json", "[" * 100_000),
        f"{STEP}/manifest.json: damaged: not JSON{UNUSABLE}",
    ),
    "manifest of a terabyte": (
        grow(STEP / "manifest.json", 1 << 40),
        f"{STEP}/manifest.json: 1,099,511,627,776 bytes; such a file has at most 16,777,216{UNUSABLE}",
    ),
    "manifest of a newer format": (
        lambda: reseal(format=9),
        f"{STEP}/manifest.json: format 9 is newer than this lmtrain's; upgrade lmtrain",
    ),
    "manifest of no format": (lambda: reseal(format="1"), f"{STEP}/manifest.json: not a manifest of step 3{UNUSABLE}"),
    "manifest of another step": (lambda: reseal(step=4), f"{STEP}/manifest.json: not a manifest of step 3{UNUSABLE}"),
    "manifest without files": (lambda: reseal(files=[]), f"{STEP}/manifest.json: not a manifest of step 3{UNUSABLE}"),
    "manifest without sizes": (
        lambda: reseal(files={name: {} for name in checkpoint.FILES}),
        f"{STEP}/manifest.json: model.safetensors: no size or hash{UNUSABLE}",
    ),
    "manifest that names a file out of the run": (
        name_of_a_path("../../../x"),
        f"{STEP}/manifest.json: names other files than model.safetensors, training.safetensors, state.json{UNUSABLE}",
    ),
    "manifest that names an absolute path": (
        name_of_a_path("/etc/passwd"),
        f"{STEP}/manifest.json: names other files than model.safetensors, training.safetensors, state.json{UNUSABLE}",
    ),
    "no weights": (lambda: WEIGHTS.unlink(), f"{WEIGHTS}: {NO_FILE}{UNUSABLE}"),
    "weights cut short": (cut(WEIGHTS, 100), f"{WEIGHTS}: damaged: not the bytes that were saved{UNUSABLE}"),
    "empty weights": (cut(WEIGHTS, 0), f"{WEIGHTS}: damaged: not the bytes that were saved{UNUSABLE}"),
    "weights of a flipped bit": (lambda: flip(WEIGHTS), f"{WEIGHTS}: damaged: not the bytes that were saved{UNUSABLE}"),
    "weights with something behind": (
        grow(WEIGHTS, 1 << 40),
        f"{WEIGHTS}: damaged: not the bytes that were saved{UNUSABLE}",
    ),
    "pickle for weights": (text(WEIGHTS, PICKLE), f"{WEIGHTS}: damaged: not the bytes that were saved{UNUSABLE}"),
    "pickle for weights, in the manifest": (
        lambda: forge(WEIGHTS, PICKLE),
        f"{WEIGHTS}: not a safetensors file{UNUSABLE}",
    ),
    "empty weights, in the manifest": (lambda: forge(WEIGHTS, b""), f"{WEIGHTS}: damaged: not JSON{UNUSABLE}"),
    "weights of a huge header": (
        lambda: forge(WEIGHTS, struct.pack("<Q", 1 << 62)),
        f"{WEIGHTS}: not a safetensors file{UNUSABLE}",
    ),
    "weights of no tensor": (
        lambda: forge(WEIGHTS, header()),
        f"{WEIGHTS}: missing tensor 'embedding.weight'{UNUSABLE}",
    ),
    "weights of a tensor beyond the file": (
        lambda: forge(
            WEIGHTS, header(**{"embedding.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
        ),
        f"{WEIGHTS}: not a safetensors file{UNUSABLE}",
    ),
    "weights that are a link": (
        lambda: aside(WEIGHTS),
        f"{WEIGHTS}: not a regular file; a run directory holds nothing else",
    ),
    "weights that are a FIFO": (
        replace_by(WEIGHTS, os.mkfifo),
        f"{WEIGHTS}: not a regular file; a run directory holds nothing else",
    ),
    "weights of another shape": (
        lambda: save_again(lambda saved: saved.model.update({"embedding.weight": saved.model["embedding.weight"].T})),
        misfit("embedding.weight", "(6, 12) F32", "(12, 6) F32"),
    ),
    "weights of another type": (
        lambda: save_again(
            lambda saved: saved.model.update({"embedding.weight": saved.model["embedding.weight"].double()})
        ),
        misfit("embedding.weight", "(12, 6) F64", "(12, 6) F32"),
    ),
    "weights without a tensor": (
        lambda: save_again(lambda saved: saved.model.pop("embedding.weight")),
        f"{WEIGHTS}: missing tensor 'embedding.weight'{UNUSABLE}",
    ),
    "weights with a tensor more": (
        lambda: save_again(
            lambda saved: saved.model.update({"more\x1b[2J\n": saved.model["embedding.weight"].clone()})
        ),
        f"{WEIGHTS}: unknown tensor 'more\\x1b[2J\\n'{UNUSABLE}",
    ),
    "NaN in weights": (
        lambda: save_again(set_nan),
        f"{WEIGHTS}: tensor 'embedding.weight' holds values that are not finite{UNUSABLE}",
    ),
    "no state": (lambda: STATE.unlink(), f"{STATE}: {NO_FILE}{UNUSABLE}"),
    "state that is a list": (lambda: forge(STATE, b"[]"), f"{STATE}: damaged: not a JSON object{UNUSABLE}"),
    "state of another tokenizer": (
        lambda: save_again(lambda saved: saved.state.update(tokenizer="")),
        OTHER_TOKENIZER,
    ),
    "FIFO beside its files": (
        lambda: os.mkfifo("run/more"),
        "run/more: not a regular file; a run directory holds nothing else",
    ),
}


OLD_VERSION = (
    f"run: was made by lmtrain 0.1.0; lmtrain {lmtrain.__version__} does not read its runs: "
    "use lmtrain 0.1.0 for it, or train it anew"
)
SETTINGS = (
    "no config",
    "config of another size",
    "config of a huge size",
)  # in a resume these are faults of usage: exit 2


@pytest.mark.parametrize("name", DAMAGES)
def test_a_run_that_can_not_be_used(home, judge, name):
    damage, message, *_ = DAMAGES[name]
    damage()
    judge(COMMANDS.values(), message, 4)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_run_that_can_not_be_resumed(home, judge, name):
    damage, *_, message = DAMAGES[name]
    damage()
    judge(RESUME, message, 2 if name in SETTINGS else 4, left_out=("cache",))
    assert not Path("hacked").exists()


@pytest.mark.parametrize("environment", ['{"lmtrain": "0.1.0"}', "{}", "damaged", None])
def test_a_run_of_an_older_version_is_refused_in_one_line(home, judge, environment):
    reconfigure("ngram_counts: null", "counts: null")
    Path("run/environment.json").unlink()
    if environment is not None:
        text("run/environment.json", environment)()
    judge([*COMMANDS.values(), "check run", RESUME], OLD_VERSION, 4)


def test_a_run_that_names_an_older_version_is_refused_whatever_its_keys(home, judge):
    edit("run/environment.json", lmtrain="0.1.0")
    judge([*COMMANDS.values(), "check run", RESUME], OLD_VERSION, 4)


def test_a_run_that_names_no_version_is_used(home, shell):
    wanted = shell("generate", "run").stdout
    Path("run/environment.json").unlink()
    done = shell("generate", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


def retrain(**changes):
    """Change the training state, and save it as lmtrain would."""

    def change(saved):
        saved.state["training"].update(changes)

    return lambda: save_again(change)


# damage to what only training reads
CONTINUED = {
    "no training state": (lambda: TRAINING.unlink(), f"{TRAINING}: {NO_FILE}{UNUSABLE}"),
    "training state cut short": (cut(TRAINING, 100), f"{TRAINING}: damaged: not the bytes that were saved{UNUSABLE}"),
    "pickle for training state": (lambda: forge(TRAINING, PICKLE), f"{TRAINING}: not a safetensors file{UNUSABLE}"),
    "training state without tensors": (
        lambda: save_again(lambda saved: saved.training.clear()),
        f"{TRAINING}: not of this run",
    ),
    "state of another step": (retrain(step=2), f"{STATE}: not a training state{UNUSABLE}"),
    "negative epoch": (retrain(epoch=-1), f"{STATE}: not a training state{UNUSABLE}"),
    "text for a step": (retrain(next_batch="x"), f"{STATE}: not a training state{UNUSABLE}"),
    "state without data": (
        lambda: save_again(lambda saved: saved.state.pop("data")),
        f"{STATE}: not a training state{UNUSABLE}",
    ),
    "negative length of a metric file": (
        lambda: save_again(lambda saved: saved.state["lengths"].update({"metrics.jsonl": -1})),
        f"{STATE}: not a training state{UNUSABLE}",
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_training_that_can_not_be_resumed(home, judge, name):
    damage, message = CONTINUED[name]
    damage()
    judge(RESUME, message, 4)
    assert not Path("hacked").exists()


NAMES = {
    "nowhere": "nowhere: no such run directory",
    "train.txt/x": "train.txt/x: no such run directory",
    "'no\x1b[2Jwhere'": "no\\x1b[2Jwhere: no such run directory",
    "'no\nwhere'": "no\\x0awhere: no such run directory",
    "''": ": not a run directory (no config.yaml in it)",
    "/dev/null": "/dev/null: no such run directory",
    ".": ".: not a run directory (no config.yaml in it)",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_not_a_run(desk, judge, name):
    judge([command.replace("run", name) for command in COMMANDS.values()], NAMES[name], 4)


@pytest.mark.parametrize("pointer", ["{", '{"step": -1}', '{"step": true}'])
def test_a_damaged_pointer_is_ignored(home, shell, pointer):
    wanted = shell("generate", "run").stdout
    text("run/best.json", pointer)()
    text("run/last.json", "[]")()
    done = shell("generate", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


# files that a user may give as tokenizer.path, for tokenizer.kind=file
LIBRARY = {
    "empty": ("", "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "no JSON": ("not json", "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "pickle": (PICKLE, "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "no tokenizer": ("{}", "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "bad UTF-8": (b'{"\xff": 1}', "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "brackets 100,000 deep": ("[" * 100_000, "theirs.json: not a tokenizer of the tokenizers library: {words}"),
    "panics": (
        json.dumps(library(normalizer=PANICS)),
        "theirs.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "panics in its model": (
        json.dumps(library(model=PREFIXED)),
        "theirs.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "panics at the first text": (
        json.dumps(library(pre_tokenizer={"type": "FixedLength", "length": 0})),
        "theirs.json: can't encode this text: {words}",
    ),
    "gap in its ids": (
        json.dumps(library(model={"type": "WordLevel", "vocab": {"a": 0, "b": 2}, "unk_token": "a"})),
        "theirs.json: the vocabulary's ids have gaps",
    ),
    "no unknown token": (
        json.dumps(
            library(
                model={
                    "type": "WordPiece",
                    "vocab": {"a": 0},
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100,
                }
            )
        ),
        "theirs.json: can't encode this text: {words}",
    ),
    "unknown token beyond the vocabulary": (
        json.dumps(library(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5})),
        "theirs.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "broken pattern": (
        json.dumps(
            library(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})
        ),
        "theirs.json: not a tokenizer of the tokenizers library: {words}",
    ),
    "an unknown model": (
        json.dumps(library(model={"type": "os.system", "vocab": {}})),
        "theirs.json: not a tokenizer of the tokenizers library: {words}",
    ),
}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", LIBRARY)
def test_a_tokenizer_file_that_can_not_be_used(desk, judge, command, name):
    content, message = LIBRARY[name]
    text("theirs.json", content)()
    judge(f"{command} c.yaml tokenizer.kind=file tokenizer.path=theirs.json", message, 4, left_out=("cache",))
