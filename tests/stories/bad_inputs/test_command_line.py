"""What is typed and can't be done: one line, exit 2."""

import re
import subprocess
import sys

import pytest
import torch

from tests.stories.bad_inputs.table import Row, both, folder, link, listing, pattern, sparse, text

TYPED = {
    "no such command": Row("generat", "lmtrain: {words}'generat'{words}'generate'{words} (lmtrain --help)", 2),
    "no such command at all": Row("zzz", "lmtrain: {words}'zzz'{words} (lmtrain --help)", 2),
    "ESC in a command": Row("'ge\x1b[2J'", "lmtrain: {words}'ge\\x1b[2J'{words} (lmtrain --help)", 2),
    "newline in a command": Row("'ge\nne'", "lmtrain: {words}'ge\\nne'{words}'generate'{words} (lmtrain --help)", 2),
    "no such option": Row("--verbos", "lmtrain: {words}--verbos {words}--version{words} (lmtrain --help)", 2),
    "train: no config": Row("train", "lmtrain: {words}'CONFIG'{words} (lmtrain --help)", 2),
    "train: no such option": Row(
        "train c.yaml --resum", "lmtrain: {words}--resum {words}--resume{words} (lmtrain --help)", 2
    ),
    "train: no such device": Row(
        "train c.yaml --device tpu",
        ("lmtrain: {words}'--device'{words}'tpu'{words}'auto', 'cpu', 'cuda', 'mps'{words} (lmtrain --help)"),
        2,
    ),
    "train: no value": Row("train c.yaml --run-dir", "lmtrain: {words}'--run-dir'{words} (lmtrain --help)", 2),
    "train: a directory with something in it": Row(
        "train c.yaml --run-dir full",
        "--run-dir full: not empty; nothing is overwritten: name another",
        2,
        both(folder("full"), text("full/thesis.txt", "mine")),
    ),
    "train: a run": Row(
        "train c.yaml --run-dir run",
        "--run-dir run: not empty; nothing is overwritten: continue the run with --resume, or name another",
        2,
    ),
    "train: a file": Row(
        "train c.yaml --run-dir train.txt", "--run-dir train.txt: not empty; nothing is overwritten: name another", 2
    ),
    "train: a directory with a newline in its name": Row(
        "train c.yaml --run-dir 'a\nb'",
        "--run-dir a\\x0ab: not empty; nothing is overwritten: name another",
        2,
        both(folder("a\nb"), text("a\nb/c", "mine")),
    ),
    "train: no name for a directory": Row(
        "train c.yaml --run-dir ''", "--run-dir : not empty; nothing is overwritten: name another", 2
    ),
    "train: a changed setting": Row(
        "train c.yaml --run-dir run --resume training.max_steps=3 seed=2",
        "seed: the run was begun with 1, not 2; it can't change in a resume",
        2,
    ),
    "train: prompt that is not ids": Row(
        "train c.yaml tokenizer.kind=ids tokenizer.vocab_size=9 data.train=ids.txt logging.sample_prompts=[x]",
        ("logging.sample_prompts: 'x': 'x' is not an id; kind ids reads whole numbers between white space"),
        2,
    ),
    "prepare: no config": Row("prepare", "lmtrain: {words}'CONFIG'{words} (lmtrain --help)", 2),
    "prepare: no such config": Row("prepare none.yaml", "none.yaml: {words}", 2),
    "prepare: no such option": Row(
        "prepare c.yaml --jsn", "lmtrain: {words}--jsn {words}--json{words} (lmtrain --help)", 2
    ),
    "prepare: a run": Row("prepare run", "run: {words}", 2),
    "prepare: malformed override": Row(
        "prepare c.yaml seed",
        "command line: 'seed': an override is KEY=VALUE, for instance model.hidden_size=256",
        2,
    ),
    "check: no config": Row("check", "lmtrain: {words}'CONFIG|RUN'{words} (lmtrain --help)", 2),
    "check: no such option": Row("check c.yaml --run-dir x", "lmtrain: {words}--run-dir (lmtrain --help)", 2),
    "check: no such device": Row(
        "check c.yaml --device gpu",
        ("lmtrain: {words}'--device'{words}'gpu'{words}'auto', 'cpu', 'cuda', 'mps'{words} (lmtrain --help)"),
        2,
    ),
    "check: a run with an override": Row(
        "check run seed=2", "check run: a run is checked as it is; leave out KEY=VALUE and --device", 2
    ),
    "generate: no run to be found": Row(
        "generate", ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"), 2
    ),
    "generate: no such option": Row(
        "generate run --promt x",
        ("lmtrain: {words}--promt {words}--prompt, --prompts{words} (lmtrain --help)"),
        2,
    ),
    "generate: one argument too many": Row(
        "generate run valid.txt", "lmtrain: {words}valid.txt{words} (lmtrain --help)", 2
    ),
    "generate: no such device": Row(
        "generate run --device tpu",
        ("lmtrain: {words}'--device'{words}'tpu'{words}'auto', 'cpu', 'cuda', 'mps'{words} (lmtrain --help)"),
        2,
    ),
    "generate: a negative length": Row(
        "generate run --max-tokens -1",
        ("lmtrain: {words}'--max-tokens'{words}1 (lmtrain --help)"),
        2,
    ),
    "generate: no length": Row(
        "generate run --max-tokens 0",
        ("lmtrain: {words}'--max-tokens'{words}1 (lmtrain --help)"),
        2,
    ),
    "generate: a word for a length": Row(
        "generate run --max-tokens many",
        ("lmtrain: {words}'--max-tokens'{words} (lmtrain --help)"),
        2,
    ),
    "generate: a length beyond 64 bits": Row(
        "generate run --max-tokens 100000000000000000000",
        ("lmtrain: {words}'--max-tokens'{words}2147483648 (lmtrain --help)"),
        2,
    ),
    "generate: a negative temperature": Row(
        "generate run --temperature -1", "temperature: should be 0 or greater and finite, not -1.0", 2
    ),
    "generate: a temperature that is no number": Row(
        "generate run --temperature nan", "temperature: should be 0 or greater and finite, not nan", 2
    ),
    "generate: an infinite temperature": Row(
        "generate run --temperature inf", "temperature: should be 0 or greater and finite, not inf", 2
    ),
    "generate: no share": Row("generate run --top-p 0", "top_p: should be greater than 0 and at most 1, not 0.0", 2),
    "generate: no penalty": Row(
        "generate run --repetition-penalty 0", "repetition_penalty: should be greater than 0 and finite, not 0.0", 2
    ),
    "generate: nothing to draw": Row(
        "generate run --temperature 0 --top-k 3", "--temperature 0 draws nothing at random: leave out --top-k", 2
    ),
    "generate: a negative seed": Row("generate run --seed -1", "seed: should be 0 or greater, not -1", 2),
    "generate: two of the most probable": Row(
        "generate run --count 2",
        "count 2: only one text is the most probable; draw with a temperature or use beams",
        2,
    ),
    "generate: two of the most probable with a penalty": Row(
        "generate run --count 2 --repetition-penalty 2",
        "count 2: only one text is the most probable; draw with a temperature or use beams",
        2,
    ),
    "generate: more than beams": Row(
        "generate run --count 3 --beams 2", "count 3: a search with 2 beams finds at most 2 texts", 2
    ),
    "generate: beams that draw": Row(
        "generate run --beams 2 --temperature 1",
        "beams: a search does not draw at random or stop at a text; leave out sampling and stop",
        2,
    ),
    "generate: beams that stop": Row(
        "generate run --beams 2 --stop x",
        "beams: a search does not draw at random or stop at a text; leave out sampling and stop",
        2,
    ),
    "generate: beams beyond memory": Row(
        "generate run --beams 1000000000000", "beams: should be from 1 to 65536, not 1000000000000", 2
    ),
    "generate: a length penalty alone": Row(
        "generate run --length-penalty 1", "--length-penalty ranks what a search finds; add --beams", 2
    ),
    "generate: an empty stop": Row("generate run --stop ''", "stop: an empty text occurs everywhere; leave it out", 2),
    "generate: a stream of JSON": Row(
        "generate run --stream --json",
        (
            "--stream prints one text while it is written; leave out other prompts, --count, --beams, "
            "--backward, --json and --show-probabilities"
        ),
        2,
    ),
    "generate: a stream of two": Row(
        "generate run --stream --prompt a --prompt b",
        (
            "--stream prints one text while it is written; leave out other prompts, --count, --beams, "
            "--backward, --json and --show-probabilities"
        ),
        2,
    ),
    "generate: backward in one direction": Row(
        "generate one --backward", "this run reads in one direction; backward takes two (model.bidirectional: true)", 2
    ),
    "generate: no such prompts": Row("generate run --prompts nowhere.txt", "--prompts nowhere.txt: {words}", 2),
    "generate: prompts with a newline in their name": Row(
        "generate run --prompts 'no\nwhere'", "--prompts no\\x0awhere: {words}", 2
    ),
    "generate: prompts of a directory": Row("generate run --prompts run", "--prompts run: {words}", 2),
    "generate: prompts behind a dangling link": Row(
        "generate run --prompts link", "--prompts link: {words}", 2, link("link", "nowhere")
    ),
    "generate: empty prompts": Row(
        "generate run --prompts empty.txt", "--prompts empty.txt: holds no prompt", 2, text("empty.txt", "")
    ),
    "generate: prompts with bad UTF-8": Row(
        "generate run --prompts p.txt",
        "--prompts p.txt:2:1: byte 2 is not UTF-8; save the file as UTF-8 (iconv -t UTF-8)",
        2,
        text("p.txt", b"a\n\xff\n"),
    ),
    "generate: prompts with NUL": Row(
        "generate run --prompts p.txt",
        "prompt 'a\\x00\\x1b[2J': not text (a NUL, or bytes that are not UTF-8)",
        2,
        text("p.txt", b"a\na\0\x1b[2J\n"),
    ),
    "generate: a terabyte of prompts": Row(
        "generate run --prompts p.txt", "--prompts p.txt: over 64 MiB; cut it into parts", 2, sparse("p.txt", 1 << 40)
    ),
    "generate: endless prompts": Row(
        "generate run --prompts /dev/zero", "--prompts /dev/zero: over 64 MiB; cut it into parts", 2
    ),
    "generate: prompt that is not ids": Row(
        "generate ids --prompt '1 x'",
        "prompt '1 x': 'x' is not an id; kind ids reads whole numbers between white space",
        3,
    ),
    "generate: prompt beyond the ids": Row(
        "generate ids --prompt '1 9'",
        "prompt '1 9': id 9 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
        3,
    ),
    "evaluate: no run to be found": Row(
        "evaluate", ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"), 2
    ),
    "evaluate: no such option": Row(
        "evaluate run --wurst 3", "lmtrain: {words}--wurst {words}--worst{words} (lmtrain --help)", 2
    ),
    "evaluate: no rows": Row(
        "evaluate run --batch-size 0",
        ("lmtrain: {words}'--batch-size'{words}1 (lmtrain --help)"),
        2,
    ),
    "evaluate: no worst line": Row(
        "evaluate run --worst 0",
        ("lmtrain: {words}'--worst'{words}1 (lmtrain --help)"),
        2,
    ),
    "evaluate: a cache for lines": Row(
        "evaluate run --cache 20",
        (
            "cache and dynamic evaluation need a state that is carried from line to line, and this run starts each "
            "line anew; train with batching.mode: stream, or batching.carry_state: true"
        ),
        2,
    ),
    "evaluate: dynamic for lines": Row(
        "evaluate run --dynamic 0.1",
        (
            "cache and dynamic evaluation need a state that is carried from line to line, and this run starts each "
            "line anew; train with batching.mode: stream, or batching.carry_state: true"
        ),
        2,
    ),
    "evaluate: a share of everything": Row(
        "evaluate run --cache 20 --cache-share 1",
        ("lmtrain: {words}'--cache-share'{words}0.99 (lmtrain --help)"),
        2,
    ),
    "score: no run to be found": Row(
        "score", ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"), 2
    ),
    "score: no run for a file": Row(
        "score valid.txt",
        ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"),
        2,
    ),
    "score: no such option": Row(
        "score run valid.txt --dirction both",
        "lmtrain: {words}--dirction {words}--direction{words} (lmtrain --help)",
        2,
    ),
    "score: no such direction": Row(
        "score run valid.txt --direction up",
        ("lmtrain: {words}'--direction'{words}'up'{words}'forward', 'backward', 'both'{words} (lmtrain --help)"),
        2,
    ),
    "score: both of one direction": Row(
        "score one valid.txt --direction both",
        "this run reads in one direction; backward takes two (model.bidirectional: true)",
        2,
    ),
    "score: tokens of both": Row(
        "score run valid.txt --direction both --tokens",
        "direction both: a token's log-probability is that of one direction; name one",
        2,
    ),
    "score: no such base": Row(
        "score run valid.txt --base 3",
        ("lmtrain: {words}'--base'{words}'3'{words}'e', '2', '10'{words} (lmtrain --help)"),
        2,
    ),
    "score: one argument too many": Row(
        "score run valid.txt valid.txt", "lmtrain: {words}valid.txt{words} (lmtrain --help)", 2
    ),
    "fill: no text": Row("fill", "fill: name a text with one blank: lmtrain fill 'the ____ sat'", 2),
    "fill: no run to be found": Row(
        "fill 'a ____'",
        ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"),
        2,
    ),
    "fill: no blank": Row("fill run 'a b'", "the text holds no blank; mark one with ____", 2),
    "fill: two blanks": Row("fill run '____ a ____'", "the text holds 2 blanks; mark one with ____", 2),
    "fill: one direction": Row(
        "fill one 'a ____'", "this run reads in one direction; to fill a blank takes two (model.bidirectional: true)", 2
    ),
    "fill: no fillings": Row(
        "fill run 'a ____' --top 0",
        ("lmtrain: {words}'--top'{words}1 (lmtrain --help)"),
        2,
    ),
    "fill: no tokens": Row(
        "fill run 'a ____' --tokens 0",
        ("lmtrain: {words}'--tokens'{words}1 (lmtrain --help)"),
        2,
    ),
    "fill: too many tokens": Row(
        "fill run 'a ____' --tokens 33",
        ("lmtrain: {words}'--tokens'{words}32 (lmtrain --help)"),
        2,
    ),
    "fill: no such option": Row(
        "fill run 'a ____' --topp 3", "lmtrain: {words}--topp {words}--top{words} (lmtrain --help)", 2
    ),
    "embed: no output": Row("embed run valid.txt", "embed: name the file to write: -o OUT.npz", 2),
    "embed: no run to be found": Row(
        "embed valid.txt -o out.npz",
        ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"),
        2,
    ),
    "embed: output of another kind": Row(
        "embed run valid.txt -o out.txt", "-o out.txt: embed writes an .npz file; let its name end with .npz", 2
    ),
    "embed: output that is there": Row(
        "embed run valid.txt -o out.npz", "out.npz: already exists; name a new file", 2, text("out.npz", "mine")
    ),
    "embed: output behind a dangling link": Row(
        "embed run valid.txt -o out.npz", "out.npz: already exists; name a new file", 2, link("out.npz", "nowhere")
    ),
    "embed: no such option": Row(
        "embed run valid.txt --outputt x",
        "lmtrain: {words}--outputt {words}--output{words} (lmtrain --help)",
        2,
    ),
    "export: no output": Row("export run", "export: name the folder to write: -o FOLDER", 2),
    "export: no run to be found": Row(
        "export -o new",
        ("no trained run under runs/; train one (lmtrain train configs/quickstart.yaml) or name one"),
        2,
    ),
    "export: output that is there": Row("export run -o run", "run: already exists; name a new folder", 2),
    "export: output with a newline that is there": Row(
        "export run -o 'a\nb'", "a\\x0ab: already exists; name a new folder", 2, folder("a\nb")
    ),
    "export: output behind a dangling link": Row(
        "export run -o out", "out: already exists; name a new folder", 2, link("out", "nowhere")
    ),
    "export: weights in 8 bits": Row(
        "export run -o new --format safetensors --int8",
        "int8: safetensors holds the weights as they are; leave out int8, or export to onnx",
        2,
    ),
    "export: no such format": Row(
        "export run -o new --format gguf",
        ("lmtrain: {words}'--format'{words}'gguf'{words}'onnx', 'safetensors'{words} (lmtrain --help)"),
        2,
    ),
    "export: no such option": Row(
        "export run -o new --int4", "lmtrain: {words}--int4 {words}--int8{words} (lmtrain --help)", 2
    ),
}
NO_DEVICE = {
    "cuda": "device cuda: PyTorch finds no CUDA device here; use cpu or auto",
    "mps": "device mps: PyTorch finds no Apple GPU here; use cpu or auto",
}


@pytest.mark.parametrize("name", TYPED)
def test_a_mistake_at_the_command_line(home, judge, name):
    row = TYPED[name]
    row.make()
    judge(row.command, row.said, row.code)


@pytest.mark.parametrize("device", NO_DEVICE)
@pytest.mark.parametrize(
    "command",
    [
        "train c.yaml",
        "check c.yaml",
        "generate run",
        "evaluate run",
        "score run valid.txt",
        "fill run 'a ____'",
        "embed run valid.txt -o new.npz",
        "export run -o new",
    ],
)
def test_a_device_that_is_not_there(home, judge, command, device):
    if torch.get_device_module(device).device_count():
        pytest.skip(f"there is a {device} device")
    judge(f"{command} --device {device}", NO_DEVICE[device], 2)


# arguments that are not UTF-8, as only a process of its own can be given them
NO_TEXT = {
    "config": (["train", b"a\xff.yaml"], "a\\udcff.yaml: {words}", 2),
    "override": (
        ["train", "c.yaml", b"name=a\xff"],
        "command line: name=:1:2: a control character (U+DCFF); remove it",
        2,
    ),
    "key": (
        ["check", "c.yaml", b"se\xffed=3"],
        "command line: 'se\\udcffed=3': an override is KEY=VALUE, for instance model.hidden_size=256",
        2,
    ),
    "option": (
        ["train", "c.yaml", b"--res\xff"],
        "lmtrain: {words}--res\\udcff {words}--resume{words} (lmtrain --help)",
        2,
    ),
    "device": (
        ["train", "c.yaml", b"--device=\xff"],
        "lmtrain: {words}'--device'{words}'\\udcff'{words}'auto', 'cpu', 'cuda', 'mps'{words} (lmtrain --help)",
        2,
    ),
    "prompt": (
        ["generate", "run", "--prompt", b"a\xff"],
        "prompt 'a\\udcff': not text (a NUL, or bytes that are not UTF-8)",
        2,
    ),
    "stop": (
        ["generate", "run", "--stop", b"a\xff"],
        "--stop 'a\\udcff': not text (a NUL, or bytes that are not UTF-8)",
        2,
    ),
    "prompts": (["generate", "run", "--prompts", b"a\xff"], "--prompts a\\udcff: {words}", 2),
    "blank": (["fill", "run", b"\xff ____"], "text '\\udcff ____': not text (a NUL, or bytes that are not UTF-8)", 2),
    "run": (["export", b"a\xff", "-o", "new"], "a\\udcff: no such run directory", 4),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_bytes_that_are_no_text(home, name):
    arguments, said, code = NO_TEXT[name]
    before = listing()
    done = subprocess.run([sys.executable, "-m", "lmtrain", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(pattern(said), done.stderr), done.stderr
    assert listing() == before
