"""Runs and tokenizer files that are damaged, foreign or hostile: named, exit 4, and nothing in them is executed."""

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
    """Other values in a JSON object; None takes a key away."""
    stored = json.loads(Path(path).read_text()) | changes
    text(path, json.dumps({key: value for key, value in stored.items() if value is not None}))()


def reseal(**changes):
    """A manifest of these values that is whole in itself, as whoever means harm would write it."""
    manifest = json.loads((STEP / "manifest.json").read_text()) | changes
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(
        (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    ).hexdigest()
    text(STEP / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")()


def forge(path, content):
    """Another file in a checkpoint, and a manifest that goes with it."""
    text(path, content)()
    files = json.loads((STEP / "manifest.json").read_text())["files"]
    files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(files=files)


def reword(change):
    """Another list of words in the run's tokenizer."""
    edit("run/tokenizer.json", tokens=change(json.loads(Path("run/tokenizer.json").read_text())["tokens"]))


def reconfigure(old, new):
    path = Path("run/config.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def save_again(change):
    """The checkpoint as lmtrain would have saved it, after a change to its tensors and state."""
    saved = checkpoint.load(Path("run/checkpoints"), 3)
    change(saved)
    checkpoint.save(Path("run/checkpoints"), saved)


def replace_by(path, make):
    """What is made stands in a file's place."""

    def harm():
        Path(path).unlink()
        make(path)

    return harm


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
    """A safetensors file of nothing but a header."""
    packed = json.dumps(tensors).encode()
    return struct.pack("<Q", len(packed)) + packed


def library(**changes):
    """A tokenizer.json of the tokenizers library, with changes."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    plain = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **plain, "model": model, **changes}


def theirs(**changes):
    """Such a tokenizer in the run's place of its own."""
    return text("run/tokenizer.json", json.dumps({"format": 1, "kind": "file", "tokenizer": library(**changes)}))


def set_nan(saved):
    saved.model["embedding.weight"][0, 0] = float("nan")


def name_of_a_path(name):
    return lambda: reseal(files={name: {"bytes": 1, "sha256": ""}})


# what panics the library: a map that can't be read; a prefix longer than the tokens
PANICS = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"ab").decode()}
PREFIXED = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "xxxx"}

# the harm, stderr of every command that uses a run, stderr of `train --resume`
HARMS = {
    "no config": (
        lambda: Path("run/config.yaml").unlink(),
        "run: not a run directory (no config.yaml in it)",
        "--run-dir run: not empty; nothing is overwritten: name another",
    ),
    "empty config": (
        cut("run/config.yaml", 0),
        "run/config.yaml:1:1: empty; start from configs/quickstart.yaml",
        "run/config.yaml:1:1: empty; start from configs/quickstart.yaml",
    ),
    "config of an unknown cell": (
        lambda: reconfigure("cell: lstm", "cell: lsmt"),
        ("run/config.yaml:30:3: model.cell: should be 'lstm', 'gru' or 'rnn', not \"lsmt\" (did you mean 'lstm'?)"),
        ("run/config.yaml:30:3: model.cell: should be 'lstm', 'gru' or 'rnn', not \"lsmt\" (did you mean 'lstm'?)"),
    ),
    "config of a later version": (
        lambda: reconfigure("cell: lstm", "cell: lstm\n  attention: true"),
        "run/config.yaml:31:3: model.attention: no such key",
        "run/config.yaml:31:3: model.attention: no such key",
    ),
    "config of another size": (
        lambda: reconfigure("hidden_size: 8", "hidden_size: 7"),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor "
            "'recurrence.stacks.0.layers.0.weight_ih_l0' is (32, 6) F32, the run's config and "
            "tokenizer want (28, 6) F32; no checkpoint can be used: take a copy of the run, or train "
            "a new one"
        ),
        "model.hidden_size: the run was begun with 7, not 8; it can't change in a resume",
    ),
    "config of a huge size": (
        lambda: reconfigure("hidden_size: 8", "hidden_size: 65536"),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor "
            "'recurrence.stacks.0.layers.0.weight_ih_l0' is (32, 6) F32, the run's config and "
            "tokenizer want (262144, 6) F32; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        "model.hidden_size: the run was begun with 65536, not 8; it can't change in a resume",
    ),
    "config that is a FIFO": (
        replace_by("run/config.yaml", os.mkfifo),
        "run/config.yaml: not a regular file; a run directory holds nothing else",
        "run/config.yaml: not a regular file; a run directory holds nothing else",
    ),
    "config that is a link": (
        lambda: aside("run/config.yaml"),
        "run/config.yaml: not a regular file; a run directory holds nothing else",
        "run/config.yaml: not a regular file; a run directory holds nothing else",
    ),
    "config of a terabyte": (
        grow("run/config.yaml", 1 << 40),
        "run/config.yaml: over 1 MiB; is this a configuration file?",
        "run/config.yaml: over 1 MiB; is this a configuration file?",
    ),
    "no tokenizer": (
        lambda: Path("run/tokenizer.json").unlink(),
        "run/tokenizer.json: no such file or directory",
        "run/tokenizer.json: no such file or directory",
    ),
    "tokenizer cut short": (
        cut("run/tokenizer.json", 50),
        "run/tokenizer.json: not a tokenizer file: Expecting value: line 1 column 51 (char 50)",
        "run/tokenizer.json: not a tokenizer file: Expecting value: line 1 column 51 (char 50)",
    ),
    "tokenizer that is a pickle": (
        text("run/tokenizer.json", PICKLE),
        "run/tokenizer.json: damaged: not UTF-8",
        "run/tokenizer.json: damaged: not UTF-8",
    ),
    "tokenizer 100,000 deep": (
        text("run/tokenizer.json", "[" * 100_000),
        (
            "run/tokenizer.json: not a tokenizer file: maximum recursion depth exceeded while "
            "decoding a JSON array from a unicode string"
        ),
        (
            "run/tokenizer.json: not a tokenizer file: maximum recursion depth exceeded while "
            "decoding a JSON array from a unicode string"
        ),
    ),
    "tokenizer that is a FIFO": (
        replace_by("run/tokenizer.json", os.mkfifo),
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
    ),
    "tokenizer that is a directory": (
        replace_by("run/tokenizer.json", os.mkdir),
        "run/tokenizer.json: not a regular file",
        "run/tokenizer.json: not a regular file",
    ),
    "tokenizer that is a link": (
        lambda: aside("run/tokenizer.json"),
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
        "run/tokenizer.json: not a regular file; a run directory holds nothing else",
    ),
    "tokenizer of a terabyte": (
        grow("run/tokenizer.json", 1 << 40),
        "run/tokenizer.json: 1,099,511,627,776 bytes are more than there should be (268,435,456)",
        "run/tokenizer.json: 1,099,511,627,776 bytes are more than there should be (268,435,456)",
    ),
    "tokenizer of a newer format": (
        lambda: edit("run/tokenizer.json", format=9),
        "run/tokenizer.json: format 9 is newer than this lmtrain's; upgrade lmtrain",
        "run/tokenizer.json: format 9 is newer than this lmtrain's; upgrade lmtrain",
    ),
    "tokenizer of another kind": (
        lambda: edit("run/tokenizer.json", kind="magic\x1b[2J\n"),
        "run/tokenizer.json: unknown tokenizer kind 'magic\\x1b[2J\\n'",
        "run/tokenizer.json: unknown tokenizer kind 'magic\\x1b[2J\\n'",
    ),
    "tokenizer without words": (
        lambda: edit("run/tokenizer.json", tokens=None),
        "run/tokenizer.json: not a tokenizer file: 'tokens'",
        "run/tokenizer.json: not a tokenizer file: 'tokens'",
    ),
    "tokenizer with a word less": (
        lambda: reword(lambda words: words[:-1]),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (12, 6) "
            "F32, the run's config and tokenizer want (11, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
        (
            "reading train.txt\n"
            "reading valid.txt\n"
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (12, 6) "
            "F32, the run's config and tokenizer want (11, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
    ),
    "tokenizer with a word twice": (
        lambda: reword(lambda words: [*words[:-1], words[0]]),
        "run/tokenizer.json: the vocabulary names a token twice",
        "run/tokenizer.json: the vocabulary names a token twice",
    ),
    "tokenizer with a pair of characters": (
        lambda: edit("run/tokenizer.json", kind="char", tokens=["ab"]),
        "run/tokenizer.json: a character vocabulary holds single characters only",
        "run/tokenizer.json: a character vocabulary holds single characters only",
    ),
    "tokenizer with words in another order": (
        lambda: reword(lambda words: words[::-1]),
        (
            "run/checkpoints/step-00000003/model.safetensors: was trained with another tokenizer "
            "than the run's tokenizer.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        (
            "reading train.txt\n"
            "reading valid.txt\n"
            "run/checkpoints/step-00000003: was trained with another tokenizer than the run's "
            "tokenizer.json; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "tokenizer with half a surrogate pair": (
        lambda: reword(lambda words: [*words[:-1], "\ud800"]),
        (
            "run/tokenizer.json: not a tokenizer file: 'utf-8' codec can't encode character '\\ud800' "
            "in position 7: surrogates not allowed"
        ),
        (
            "run/tokenizer.json: not a tokenizer file: 'utf-8' codec can't encode character '\\ud800' "
            "in position 7: surrogates not allowed"
        ),
    ),
    "tokenizer of a huge vocabulary": (
        text("run/tokenizer.json", '{"format": 1, "kind": "ids", "ids": 1000000000000, "pad_id": 0}'),
        "run/tokenizer.json: 1000000000000 ids with pad id 0",
        "run/tokenizer.json: 1000000000000 ids with pad id 0",
    ),
    "tokenizer that panics its library": (
        theirs(normalizer=PANICS),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: Precompiled: "
            'Error("Cannot parse precompiled_charsmap", line: 0, column: 0)'
        ),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: Precompiled: "
            'Error("Cannot parse precompiled_charsmap", line: 0, column: 0)'
        ),
    ),
    "tokenizer that panics its library in its model": (
        theirs(model=PREFIXED),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: range end index "
            "18446744073709551614 out of range for slice of length 2"
        ),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: range end index "
            "18446744073709551614 out of range for slice of length 2"
        ),
    ),
    "tokenizer with a gap in its ids": (
        theirs(model={"type": "WordLevel", "vocab": {"a": 0, "b": 2}, "unk_token": "a"}),
        "run/tokenizer.json: the vocabulary's ids have gaps",
        "run/tokenizer.json: the vocabulary's ids have gaps",
    ),
    "tokenizer with a broken pattern": (
        theirs(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: Oniguruma error: end "
            "pattern with unmatched parenthesis at line 1 column 198"
        ),
        (
            "run/tokenizer.json: not a tokenizer of the tokenizers library: Oniguruma error: end "
            "pattern with unmatched parenthesis at line 1 column 198"
        ),
    ),
    "no checkpoint": (
        lambda: shutil.rmtree(STEP),
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "empty checkpoint": (
        lambda: [shutil.rmtree(STEP), STEP.mkdir()],
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "checkpoint that is a file": (
        lambda: [shutil.rmtree(STEP), STEP.touch()],
        (
            "run/checkpoints/step-00000003/manifest.json: not a directory; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: not a directory; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "checkpoint that is a link": (
        lambda: aside(STEP),
        "run/checkpoints/step-00000003: not a regular file; a run directory holds nothing else",
        "run/checkpoints/step-00000003: not a regular file; a run directory holds nothing else",
    ),
    "no manifest": (
        lambda: (STEP / "manifest.json").unlink(),
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: no such file or directory; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest cut short": (
        cut(STEP / "manifest.json", 100),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not JSON; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not JSON; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest of a flipped bit": (
        lambda: flip(STEP / "manifest.json"),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not the bytes that were saved; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not the bytes that were saved; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest that is a list": (
        text(STEP / "manifest.json", "[]"),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not a JSON object; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not a JSON object; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest 100,000 deep": (
        text(STEP / "manifest.json", "[" * 100_000),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not JSON; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: damaged: not JSON; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest of a terabyte": (
        grow(STEP / "manifest.json", 1 << 40),
        (
            "run/checkpoints/step-00000003/manifest.json: 1,099,511,627,776 bytes are more than "
            "there should be (16,777,216); no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: 1,099,511,627,776 bytes are more than "
            "there should be (16,777,216); no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
    ),
    "manifest of a newer format": (
        lambda: reseal(format=9),
        ("run/checkpoints/step-00000003/manifest.json: format 9 is newer than this lmtrain's; upgrade lmtrain"),
        ("run/checkpoints/step-00000003/manifest.json: format 9 is newer than this lmtrain's; upgrade lmtrain"),
    ),
    "manifest of no format": (
        lambda: reseal(format="1"),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest of another step": (
        lambda: reseal(step=4),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest without files": (
        lambda: reseal(files=[]),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: not a manifest of step 3; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest without sizes": (
        lambda: reseal(files={name: {} for name in checkpoint.FILES}),
        (
            "run/checkpoints/step-00000003/manifest.json: model.safetensors: no size or hash; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: model.safetensors: no size or hash; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "manifest that names a file out of the run": (
        name_of_a_path("../../../x"),
        (
            "run/checkpoints/step-00000003/manifest.json: names other files than model.safetensors, "
            "training.safetensors, state.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: names other files than model.safetensors, "
            "training.safetensors, state.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
    ),
    "manifest that names an absolute path": (
        name_of_a_path("/etc/passwd"),
        (
            "run/checkpoints/step-00000003/manifest.json: names other files than model.safetensors, "
            "training.safetensors, state.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        (
            "run/checkpoints/step-00000003/manifest.json: names other files than model.safetensors, "
            "training.safetensors, state.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
    ),
    "no weights": (
        lambda: WEIGHTS.unlink(),
        (
            "run/checkpoints/step-00000003/model.safetensors: no such file or directory; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: no such file or directory; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights cut short": (
        cut(WEIGHTS, 100),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "empty weights": (
        cut(WEIGHTS, 0),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights of a flipped bit": (
        lambda: flip(WEIGHTS),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights with something behind": (
        grow(WEIGHTS, 1 << 40),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "pickle for weights": (
        text(WEIGHTS, PICKLE),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "pickle for weights, in the manifest": (
        lambda: forge(WEIGHTS, PICKLE),
        (
            "run/checkpoints/step-00000003/model.safetensors: not a safetensors file; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: not a safetensors file; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "empty weights, in the manifest": (
        lambda: forge(WEIGHTS, b""),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not JSON; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: damaged: not JSON; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights of a huge header": (
        lambda: forge(WEIGHTS, struct.pack("<Q", 1 << 62)),
        (
            "run/checkpoints/step-00000003/model.safetensors: not a safetensors file; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: not a safetensors file; no checkpoint "
            "can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights of no tensor": (
        lambda: forge(WEIGHTS, header()),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'embedding.weight'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'embedding.weight'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights of a tensor beyond the file": (
        lambda: forge(
            WEIGHTS, header(**{"embedding.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'output.bias'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'output.bias'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights that are a link": (
        lambda: aside(WEIGHTS),
        ("run/checkpoints/step-00000003/model.safetensors: not a regular file; a run directory holds nothing else"),
        ("run/checkpoints/step-00000003/model.safetensors: not a regular file; a run directory holds nothing else"),
    ),
    "weights that are a FIFO": (
        replace_by(WEIGHTS, os.mkfifo),
        ("run/checkpoints/step-00000003/model.safetensors: not a regular file; a run directory holds nothing else"),
        ("run/checkpoints/step-00000003/model.safetensors: not a regular file; a run directory holds nothing else"),
    ),
    "weights of another shape": (
        lambda: save_again(lambda saved: saved.model.update({"embedding.weight": saved.model["embedding.weight"].T})),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (6, 12) "
            "F32, the run's config and tokenizer want (12, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (6, 12) "
            "F32, the run's config and tokenizer want (12, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
    ),
    "weights of another type": (
        lambda: save_again(
            lambda saved: saved.model.update({"embedding.weight": saved.model["embedding.weight"].double()})
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (12, 6) "
            "F64, the run's config and tokenizer want (12, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' is (12, 6) "
            "F64, the run's config and tokenizer want (12, 6) F32; no checkpoint can be used: take a "
            "copy of the run, or train a new one"
        ),
    ),
    "weights without a tensor": (
        lambda: save_again(lambda saved: saved.model.pop("embedding.weight")),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'embedding.weight'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: missing tensor 'embedding.weight'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "weights with a tensor more": (
        lambda: save_again(
            lambda saved: saved.model.update({"more\x1b[2J\n": saved.model["embedding.weight"].clone()})
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: unknown tensor 'more\\x1b[2J\\n'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: unknown tensor 'more\\x1b[2J\\n'; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "NaN in weights": (
        lambda: save_again(set_nan),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' holds values "
            "that are not finite; no checkpoint can be used: take a copy of the run, or train a new "
            "one"
        ),
        (
            "run/checkpoints/step-00000003/model.safetensors: tensor 'embedding.weight' holds values "
            "that are not finite; no checkpoint can be used: take a copy of the run, or train a new "
            "one"
        ),
    ),
    "no state": (
        lambda: STATE.unlink(),
        (
            "run/checkpoints/step-00000003/state.json: no such file or directory; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/state.json: no such file or directory; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
    ),
    "state that is a list": (
        lambda: forge(STATE, b"[]"),
        (
            "run/checkpoints/step-00000003/state.json: damaged: not a JSON object; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
        (
            "run/checkpoints/step-00000003/state.json: damaged: not a JSON object; no checkpoint can "
            "be used: take a copy of the run, or train a new one"
        ),
    ),
    "state of another tokenizer": (
        lambda: save_again(lambda saved: saved.state.update(tokenizer="")),
        (
            "run/checkpoints/step-00000003/model.safetensors: was trained with another tokenizer "
            "than the run's tokenizer.json; no checkpoint can be used: take a copy of the run, or "
            "train a new one"
        ),
        (
            "run/checkpoints/step-00000003: was trained with another tokenizer than the run's "
            "tokenizer.json; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "FIFO beside its files": (
        lambda: os.mkfifo("run/more"),
        "run/more: not a regular file; a run directory holds nothing else",
        "run/more: not a regular file; a run directory holds nothing else",
    ),
}


OLD_VERSION = (
    f"run: was made by lmtrain 0.1.0; lmtrain {lmtrain.__version__} does not read its runs: "
    "use lmtrain 0.1.0 for it, or train it anew"
)
SETTINGS = ("no config", "config of another size", "config of a huge size")  # a resume holds against its own: exit 2


@pytest.mark.parametrize("name", HARMS)
def test_a_run_that_can_not_be_used(home, judge, name):
    harm, said, _ = HARMS[name]
    harm()
    judge(COMMANDS.values(), said, 4)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", HARMS)
def test_a_run_that_can_not_go_on(home, judge, name):
    harm, _, said = HARMS[name]
    harm()
    judge(RESUME, said, 2 if name in SETTINGS else 4, left_out=("cache",))
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
    """Another state of the training, saved as lmtrain would."""

    def change(saved):
        saved.state["training"].update(changes)

    return lambda: save_again(change)


# harms to what training alone reads
CONTINUED = {
    "no training state": (
        lambda: TRAINING.unlink(),
        (
            "run/checkpoints/step-00000003/training.safetensors: no such file or directory; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "training state cut short": (
        cut(TRAINING, 100),
        (
            "run/checkpoints/step-00000003/training.safetensors: damaged: not the bytes that were "
            "saved; no checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "pickle for training state": (
        lambda: forge(TRAINING, PICKLE),
        (
            "run/checkpoints/step-00000003/training.safetensors: not a safetensors file; no "
            "checkpoint can be used: take a copy of the run, or train a new one"
        ),
    ),
    "training state without tensors": (
        lambda: save_again(lambda saved: saved.training.clear()),
        "run/checkpoints/step-00000003/training.safetensors: not of this run",
    ),
    "state of another step": (
        retrain(step=2),
        (
            "run/checkpoints/step-00000003/state.json: not a training state; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "negative epoch": (
        retrain(epoch=-1),
        (
            "run/checkpoints/step-00000003/state.json: not a training state; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "text for a step": (
        retrain(next_batch="x"),
        (
            "run/checkpoints/step-00000003/state.json: not a training state; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "state without data": (
        lambda: save_again(lambda saved: saved.state.pop("data")),
        (
            "run/checkpoints/step-00000003/state.json: not a training state; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
    "negative length of a metric file": (
        lambda: save_again(lambda saved: saved.state["lengths"].update({"metrics.jsonl": -1})),
        (
            "run/checkpoints/step-00000003/state.json: not a training state; no checkpoint can be "
            "used: take a copy of the run, or train a new one"
        ),
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_training_that_can_not_go_on(home, judge, name):
    harm, said = CONTINUED[name]
    harm()
    judge(RESUME, said, 4)
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
def test_what_is_no_run(desk, judge, name):
    judge([command.replace("run", name) for command in COMMANDS.values()], NAMES[name], 4)


@pytest.mark.parametrize("pointer", ["{", '{"step": -1}', '{"step": true}'])
def test_a_damaged_pointer_is_passed_by(home, shell, pointer):
    wanted = shell("generate", "run").stdout
    text("run/best.json", pointer)()
    text("run/last.json", "[]")()
    done = shell("generate", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


# a tokenizer.json of the user's, for kind file
LIBRARY = {
    "empty": (
        "",
        ("theirs.json: not a tokenizer of the tokenizers library: EOF while parsing a value at line 1 column 0"),
    ),
    "no JSON": (
        "not json",
        ("theirs.json: not a tokenizer of the tokenizers library: expected ident at line 1 column 2"),
    ),
    "pickle": (PICKLE, ("theirs.json: not a tokenizer of the tokenizers library: expected value at line 1 column 1")),
    "no tokenizer": (
        "{}",
        ("theirs.json: not a tokenizer of the tokenizers library: Model missing. at line 1 column 2"),
    ),
    "bad UTF-8": (
        b'{"\xff": 1}',
        ("theirs.json: not a tokenizer of the tokenizers library: expected `,` or `}` at line 1 column 7"),
    ),
    "brackets 100,000 deep": (
        "[" * 100_000,
        (
            "theirs.json: not a tokenizer of the tokenizers library: invalid type: sequence, "
            "expected struct Tokenizer at line 1 column 1"
        ),
    ),
    "panics": (
        json.dumps(library(normalizer=PANICS)),
        (
            'theirs.json: not a tokenizer of the tokenizers library: Precompiled: Error("Cannot '
            'parse precompiled_charsmap", line: 0, column: 0)'
        ),
    ),
    "panics in its model": (
        json.dumps(library(model=PREFIXED)),
        (
            "theirs.json: not a tokenizer of the tokenizers library: range end index "
            "18446744073709551614 out of range for slice of length 2"
        ),
    ),
    "panics at the first text": (
        json.dumps(library(pre_tokenizer={"type": "FixedLength", "length": 0})),
        "theirs.json: can't encode this text: chunk size must be non-zero",
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
        ("theirs.json: can't encode this text: WordPiece error: Missing [UNK] token from the vocabulary"),
    ),
    "unknown token beyond the vocabulary": (
        json.dumps(library(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5})),
        (
            "theirs.json: not a tokenizer of the tokenizers library: Unable to load vocab "
            "UnkIdNotInVocabulary at line 1 column 226"
        ),
    ),
    "broken pattern": (
        json.dumps(
            library(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})
        ),
        (
            "theirs.json: not a tokenizer of the tokenizers library: Oniguruma error: end pattern "
            "with unmatched parenthesis at line 1 column 198"
        ),
    ),
    "an unknown model": (
        json.dumps(library(model={"type": "os.system", "vocab": {}})),
        (
            "theirs.json: not a tokenizer of the tokenizers library: data did not match any variant "
            "of untagged enum ModelUntagged at line 1 column 204"
        ),
    ),
}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", LIBRARY)
def test_a_tokenizer_file_that_can_not_be_used(desk, judge, command, name):
    content, said = LIBRARY[name]
    text("theirs.json", content)()
    judge(f"{command} c.yaml tokenizer.kind=file tokenizer.path=theirs.json", said, 4, left_out=("cache",))
