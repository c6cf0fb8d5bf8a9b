"""The command line as a user meets it: real processes, their output, their exit codes."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch

from lmtrain import checkpoint
from lmtrain.cli.terminal import escape
from lmtrain.training.start import train

COMMAND = [sys.executable, "-m", "lmtrain"]
IDS = ["tokenizer.kind=ids", "tokenizer.vocab_size=9", "logging.sample_prompts=[]"]


def lmtrain(*arguments, **settings):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings)


@pytest.fixture
def run(small):
    return train(small("training.max_steps=3")).run


def listing(folder):
    """Every file with its content."""
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def test_train_then_generate_and_evaluate(corpus):
    done = lmtrain("train", "config.yaml", "model.hidden_size=9")
    assert done.returncode == 0, done.stderr
    assert "best validation" in done.stdout
    assert "\r" not in done.stderr
    assert "model:\n" in (corpus / "runs/config/config.yaml").read_text()
    assert "hidden_size: 9" in (corpus / "runs/config/config.yaml").read_text()
    assert json.loads((corpus / "runs/config/environment.json").read_text())["torch"] == torch.__version__
    assert lmtrain("generate").stdout.count("\n") == 1
    rows = [
        json.loads(line)
        for line in lmtrain("generate", "--prompt", "a", "--prompt", "b c", "--json").stdout.splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["a", "b c"]
    assert set(rows[0]) == {"prompt", "completion", "text", "finished", "log_probability"}
    figures = json.loads(lmtrain("evaluate", "--json").stdout)
    assert set(figures) == {
        "tokens", "nats_per_token", "perplexity", "bits_per_character", "bits_per_byte", "unknown_tokens",
        "backward_perplexity", "fill_accuracy", "perplexity_without_end_tokens", "perplexity_without_unknown_tokens",
        "backward_bits_per_character",
    }  # fmt: skip
    assert json.loads(
        lmtrain("evaluate", "runs/config", "valid.txt", "--json", "--batch-size", 2).stdout
    ) == pytest.approx(figures, rel=1e-5)
    assert json.loads(lmtrain("evaluate", "valid.txt", "--json").stdout) == figures
    assert "perplexity" in lmtrain("evaluate").stdout


def test_prompts_from_a_file_and_from_standard_input(run, corpus):
    (corpus / "prompts.txt").write_text("a b\nc\n")
    by_file = lmtrain("generate", run, "--prompts", "prompts.txt", "--max-tokens", 4)
    by_stdin = lmtrain("generate", run, "--prompts", "-", "--max-tokens", 4, input="a b\nc\n")
    assert by_file.stdout == by_stdin.stdout
    assert len(by_file.stdout.splitlines()) == 2
    assert (
        "note: prompt 'a zebra': 'zebra' unknown to the model, read as <unk>"
        in lmtrain("generate", run, "--prompt", "a zebra").stderr
    )


def test_check_reports_the_data_and_trains_nothing(corpus):
    done = lmtrain("check", "config.yaml")
    assert done.returncode == 0
    assert "vocabulary: 12 tokens (word)" in done.stdout
    assert "train: 43 sequences" in done.stdout
    assert "padding" in done.stdout
    assert not (corpus / "runs").exists()


def test_a_stream_is_checked_trained_continued_and_scored_in_several_ways(corpus, shell):
    overrides = ["batching.mode=stream", "model.bidirectional=false", "training.max_steps=4"]
    report = shell("check", "config.yaml", *overrides).stdout
    assert "train: 43 lines, " in report
    assert "batches: 1 an epoch, 8 columns of " in report or "batches: 1 an epoch" in report
    assert shell("train", "config.yaml", *overrides).returncode == 0
    plain = json.loads(shell("evaluate", "--json").stdout)
    asked = shell("evaluate", "--json", "--cache", "20", "--dynamic", "0.1", "--dynamic-steps", "9")
    adapted = json.loads(asked.stdout)
    assert {name: adapted[name] for name in plain} == plain
    assert adapted["cache_perplexity"] > 1
    assert adapted["dynamic_perplexity"] > 1
    assert "cache perplexity" in shell("evaluate", "--cache", "20").stdout
    refused = shell("evaluate", "--batch-size", "4")
    assert (refused.returncode, refused.stdout) == (2, "")
    (row,) = shell("generate", "--prompt", "a b\nc", "--max-tokens", "9", "--json").stdout.splitlines()
    assert json.loads(row)["text"].startswith("a b\nc")


def test_adapting_to_lines_that_begin_anew_is_refused(run, shell):
    done = shell("evaluate", run, "--cache", "20")
    assert (done.returncode, done.stdout) == (2, "")
    assert "this run begins anew at each line" in done.stderr


def test_check_names_the_faults_of_all_files(corpus):
    (corpus / "train.txt").write_bytes(b"a\n\xff\n")
    (corpus / "valid.txt").write_bytes(b"a\0\n")
    (corpus / "more.txt").write_bytes(b"\xff\n")
    done = lmtrain("check", "config.yaml", "data.train=[train.txt, more.txt]")
    assert done.returncode == 3
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        "train.txt:2:1",
        "more.txt:1:1",
        "valid.txt:1:2",
    ]
    (corpus / "train.txt").write_text("1 x\n")
    (corpus / "valid.txt").write_text("1 99\n")
    done = lmtrain("check", "config.yaml", *IDS)
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["train.txt:1:3", "valid.txt:1:3"]


def test_version_and_help():
    assert lmtrain("--version").stdout.startswith("lmtrain 0.")
    for arguments in (["--help"], ["-h"], ["train", "-h"], ["generate", "--help"]):
        done = lmtrain(*arguments)
        assert done.returncode == 0
        assert "Usage: " in done.stdout
    assert "Commands:" in lmtrain().stderr + lmtrain().stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generat"], "No such command 'generat'"),
        (["generate", "--promt", "x"], "--prompt"),
        (["generate", "--max-tokens", "-1"], "'--max-tokens': Input should be greater than or equal to 1"),
        (["generate", "--device", "tpu"], "tpu"),
        (["train"], "CONFIG"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file or directory"),
        (["train", "config.yaml", "model.hiden_size=3"], "did you mean 'hidden_size'"),
        (["train", "config.yaml", "--run-dir", "full"], "--run-dir full: not empty"),
        (["generate"], "no trained run under runs/"),
        (["generate", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: no such file"),
        (["generate", "--prompts", "empty.txt"], "holds no prompt"),
        (["generate", "--prompt", "a\udcff"], "not text"),
        (["train", "config.yaml", "logging.sample_prompts=[x]", "tokenizer.kind=ids"], "logging.sample_prompts: 'x'"),
        pytest.param(
            ["train", "config.yaml", "training.device=cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_mistake_at_the_command_line_is_one_line_and_exit_2(corpus, shell, arguments, said):
    (corpus / "full").mkdir()
    (corpus / "full" / "thesis.txt").write_text("mine")
    (corpus / "empty.txt").write_text("")
    before = listing(corpus)
    done = shell(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert listing(corpus) == before


@pytest.mark.parametrize(
    ("content", "overrides", "said"),
    [
        (b"", [], "train.txt: no token occurs 1 times or more"),
        (b"\n\n", ["tokenizer.kind=byte"], "train.txt: no text"),
        (b"fine\n\xff\n", [], "train.txt:2:1: byte 5 is not UTF-8"),
        (b"1 2\n-3\n", IDS, "train.txt:2:1: id -3 is not in 0..8"),
        (b"1 2 9\n", IDS, "train.txt:1:5: id 9 is not in 0..8"),
        (b"1 0 2\n", IDS, "train.txt:1:3: id 0 is the pad id"),
        (b"1 one\n", IDS, "train.txt:1:3: 'one' is not an id"),
    ],
)
def test_a_fault_of_the_data_is_one_line_and_exit_3(corpus, shell, content, overrides, said):
    (corpus / "train.txt").write_bytes(content)
    done = shell("train", "config.yaml", *overrides)
    assert (done.returncode, done.stdout) == (3, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (corpus / "runs").exists()  # nothing begun


def test_data_that_is_odd_but_usable_is_used(corpus):
    """Fewer sequences than a batch; a vocabulary of one; a validation set that is the training set."""
    (corpus / "train.txt").write_bytes(b"\xef\xbb\xbfa\r\na a\r\n")
    done = lmtrain("train", "config.yaml", "data.valid=train.txt", "batching.max_length=1")
    assert done.returncode == 0, done.stderr
    assert "note: 2 of 2 validation sequences also stand in the training set" in done.stderr
    assert "note: 1 training sequences are longer than 1 tokens and are split" in done.stderr


HARMS = {
    "not a run": (lambda run: (run / "config.yaml").unlink(), "not a run directory"),
    "a pickle": (lambda run: weights_of(run).write_bytes(PICKLE), "damaged"),
    "truncated": (lambda run: weights_of(run).write_bytes(weights_of(run).read_bytes()[:100]), "damaged"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "another tokenizer": (lambda run: reword(run), "tensor 'embedding.weight' is (12, 6) float32"),
    "another shape": (lambda run: change_config(run, "hidden_size: 8", "hidden_size: 7"), "tensor '"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints/step-00000003"), "no such file"),
    "newer format": (lambda run: manifest(run, format=9), "format 9 is newer"),
    "path out of the run": (lambda run: manifest(run, files={"../../../x": {"bytes": 1, "sha256": ""}}), "other files"),
    "absolute path": (lambda run: manifest(run, files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), "other files"),
    "link": (lambda run: link(run), "not a regular file"),
    "nan": (lambda run: poison(run), "not finite"),
    "fifo": (lambda run: fifo(run), "config.yaml: not a regular file"),
    "weights of another tokenizer": (lambda run: reorder(run), "trained with another tokenizer"),
    "huge sizes": (lambda run: change_config(run, "hidden_size: 8", "hidden_size: 65536"), "tensor '"),
    "broken config": (lambda run: change_config(run, "cell: lstm", "cell: lsmt"), "model.cell: should be"),
}
PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch hacked\x85R."


def weights_of(run):
    return run / "checkpoints" / "step-00000003" / "model.safetensors"


def reword(run):
    stored = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(stored | {"tokens": stored["tokens"][:-1]}))


def reorder(run):
    stored = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(stored | {"tokens": stored["tokens"][::-1]}))


def fifo(run):
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")


def change_config(run, old, new):
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def manifest(run, **changes):
    path = weights_of(run).with_name("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link(run):
    weights_of(run).rename(run / "aside")
    weights_of(run).symlink_to(run / "aside")


def poison(run):
    saved = checkpoint.load(run / "checkpoints", 3)
    saved.model["embedding.weight"][0, 0] = float("nan")
    checkpoint.save(run / "checkpoints", saved)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_or_hostile_run_is_refused_in_one_line_with_exit_4(run, corpus, shell, harm):
    damage, said = HARMS[harm]
    damage(run)
    before = listing(corpus)
    for command in (["generate", run], ["evaluate", run, "valid.txt"]):
        done = shell(*command)
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert listing(corpus) == before
    assert not (corpus / "hacked").exists()


def test_a_damaged_pointer_is_passed_by(run, shell):
    wanted = shell("generate", run).stdout
    (run / "best.json").write_text("{")
    (run / "last.json").write_text("[]")
    assert shell("generate", run).stdout == wanted


def test_nothing_is_written_through_a_link(run, corpus, shell):
    precious = corpus / "precious"
    precious.write_text("mine")
    for name in (".lock", "metrics.jsonl", "config.yaml"):
        (run / name).unlink()
        (run / name).symlink_to(precious)
        done = shell("train", "config.yaml", "--run-dir", run, "--resume", "training.max_epochs=3")
        assert done.returncode in (2, 4), done.stderr
        (run / name).unlink()
        (run / name).write_text("")
    assert precious.read_text() == "mine"


def test_a_lost_terminal_does_not_end_training(corpus):
    for stream in ("2>/dev/full", "2>&-", ">/dev/full", ">&-", "2>&1 | true"):
        command = (
            f"{sys.executable} -m lmtrain train config.yaml --run-dir {corpus}/run {stream}; exit ${{PIPESTATUS[0]}}"
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, (stream, done.stderr)
        assert json.loads((corpus / "run" / "last.json").read_text())["step"] == 12
        shutil.rmtree(corpus / "run")


def test_a_run_that_is_none_is_exit_4(corpus):
    done = lmtrain("generate", "nowhere")
    assert (done.returncode, done.stderr) == (4, "nowhere: no such run directory\n")


def test_a_directory_that_can_not_be_written_is_exit_5(corpus):
    (corpus / "runs").symlink_to("nowhere")
    done = lmtrain("train", "config.yaml")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_output_into_a_closed_pipe_ends_quietly(run):
    command = f"{sys.executable} -m lmtrain generate {run} --prompt a --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "generate", str(run)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1


def test_on_a_terminal_there_is_a_bar_and_no_control_character_out_of_the_model(corpus):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen([*COMMAND, "train", "config.yaml"], stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    said = b""
    while True:
        try:
            part = os.read(controller, 1 << 16)
        except OSError:
            break
        said += part
    assert process.wait() == 0
    assert b"step" in said
    assert b"tokens/s" in said
    assert escape("a\x1b[2Jb\x07\x9b\r\n\tc한") == "a\\x1b[2Jb\\x07\\x9b\\x0d\n\tc한"


def test_help_is_quick():
    """A bound that only an import of torch would break (1.5 s); scripts/benchmark.py is for real timings."""
    best = min(_seconds() for _ in range(3))
    assert best < 1.0


def _seconds():
    started_s = time.perf_counter()
    lmtrain("--help")
    return time.perf_counter() - started_s
