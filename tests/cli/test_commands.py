"""The command line as a user sees it: real processes, their output and their exit codes."""

import json
import os
import re
import struct
import subprocess
import sys
import time
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.errors import escape
from lmtrain.inference.adaptation import Cache, Dynamic
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train

COMMAND = [sys.executable, "-m", "lmtrain"]


def lmtrain(*arguments, **settings):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **settings)


@pytest.fixture
def run(small):
    return train(small("training.max_steps=3")).run


PROMPT = "é 나는 \U0001f389"


@pytest.mark.parametrize("encoding", ["cp949", "ascii", "utf-8"])
def test_json_is_json_in_every_encoding_of_the_console(run, corpus, encoding):
    (corpus / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    said = subprocess.run(
        [*COMMAND, "generate", "--prompts", "prompts.txt", "--json"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert json.loads(said.stdout.decode(encoding))["prompt"] == PROMPT
    assert said.stderr.decode(encoding).startswith("note: prompt 'é" if encoding == "utf-8" else "note: prompt ")
    assert said.returncode == 0


def test_piped_text_is_utf8_whatever_the_locale(run, corpus):
    (corpus / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    said = subprocess.run(
        [*COMMAND, "generate", "--prompts", "prompts.txt"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert (said.stdout.decode(), said.returncode) == (lmtrain("generate", "--prompts", "prompts.txt").stdout, 0)
    assert said.stdout.decode().startswith(PROMPT)
    assert b"Traceback" not in said.stderr


def test_a_reader_that_has_gone_is_no_fault(run):
    many = ["generate", "--temperature", "1", "--count", "3000", "--prompt", "a" * 100]  # more than a pipe holds
    process = subprocess.Popen([*COMMAND, *many], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0


def test_train_then_generate_and_evaluate(corpus, shell):
    done = shell("train", "config.yaml", "model.hidden_size=9")
    assert done.returncode == 0, done.stderr
    assert "best validation" in done.stdout
    assert "\r" not in done.stderr
    assert "model:\n" in (corpus / "runs/config/config.yaml").read_text()
    assert "hidden_size: 9" in (corpus / "runs/config/config.yaml").read_text()
    assert json.loads((corpus / "runs/config/environment.json").read_text())["torch"] == torch.__version__
    assert lmtrain("generate").stdout.count("\n") == 1
    rows = [
        json.loads(line) for line in shell("generate", "--prompt", "a", "--prompt", "b c", "--json").stdout.splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["a", "b c"]
    assert set(rows[0]) == {"prompt", "completion", "text", "finished", "log_probability"}
    figures = json.loads(shell("evaluate", "--json").stdout)
    assert set(figures) == {
        "tokens", "nats_per_token", "perplexity", "bits_per_character", "bits_per_byte", "unknown_tokens",
        "backward_perplexity", "fill_accuracy", "perplexity_without_end_tokens", "perplexity_without_unknown_tokens",
        "backward_bits_per_character",
    }  # fmt: skip
    assert json.loads(
        shell("evaluate", "runs/config", "valid.txt", "--json", "--batch-size", 2).stdout
    ) == pytest.approx(figures, rel=1e-5)
    assert json.loads(shell("evaluate", "valid.txt", "--json").stdout) == figures
    assert ["perplexity", f"{figures['perplexity']:.4f}"] in map(str.split, shell("evaluate").stdout.splitlines())


def test_prompts_from_a_file_and_from_standard_input(run, corpus, shell):
    (corpus / "prompts.txt").write_text("a b\nc\n")
    by_file = shell("generate", run, "--prompts", "prompts.txt", "--max-tokens", 4)
    by_stdin = lmtrain("generate", run, "--prompts", "-", "--max-tokens", 4, input="a b\nc\n")
    assert by_file.stdout == by_stdin.stdout
    assert len(by_file.stdout.splitlines()) == 2
    assert (
        "note: prompt 'a zebra': 'zebra' unknown to the model, read as <unk>"
        in shell("generate", run, "--prompt", "a zebra").stderr
    )


def test_check_reports_the_data_and_trains_nothing(corpus, shell):
    done = shell("check", "config.yaml")
    assert done.returncode == 0
    assert "vocabulary: 12 tokens (word)" in done.stdout
    assert "train: 43 sequences" in done.stdout
    assert "padding" in done.stdout
    assert not (corpus / "runs").exists()


def test_a_stream_is_checked_trained_continued_and_scored_in_several_ways(corpus, shell):
    overrides = ["batching.mode=stream", "model.bidirectional=false", "training.max_steps=4"]
    report = shell("check", "config.yaml", *overrides).stdout
    assert "train: 43 lines, " in report
    assert "batches: 1 an epoch, 8 columns of " in report
    assert shell("train", "config.yaml", *overrides).returncode == 0
    plain = json.loads(shell("evaluate", "--json").stdout)
    asked = shell("evaluate", "--json", "--cache", "20", "--dynamic", "0.1", "--dynamic-steps", "9")
    adapted = json.loads(asked.stdout)
    assert {name: adapted[name] for name in plain} == plain
    evaluated = load().evaluate(cache=Cache(20), dynamic=Dynamic(0.1, steps=9)).adapted
    for name in ("cache", "dynamic"):
        assert adapted[f"{name}_perplexity"] == pytest.approx(evaluated[name].perplexity) != plain["perplexity"]
    printed = map(str.split, shell("evaluate", "--cache", "20").stdout.splitlines())
    assert ["cache", "perplexity", f"{adapted['cache_perplexity']:.4f}"] in printed
    refused = shell("evaluate", "--batch-size", "4")
    assert (refused.returncode, refused.stdout) == (2, "")
    (row,) = shell("generate", "--prompt", "a b\nc", "--max-tokens", "9", "--json").stdout.splitlines()
    assert json.loads(row)["text"].startswith("a b\nc")


def test_version_and_help():
    assert lmtrain("--version").stdout == "lmtrain 0.2.0\n"
    commands = {"prepare", "train", "generate", "evaluate", "score", "fill", "embed", "export", "check"}
    for arguments in (["--help"], ["-h"], []):
        done = lmtrain(*arguments)
        assert commands <= set(re.findall(r"^ +(\w+)  ", done.stdout + done.stderr, re.MULTILINE))
        assert (done.returncode == 0) == bool(arguments)
    for arguments, option in ((["train", "-h"], "--resume"), (["generate", "--help"], "--temperature")):
        done = lmtrain(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert option in done.stdout


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


@pytest.mark.parametrize("stream", [">/dev/full 2>&-", "2>&1 | true"])
def test_a_lost_terminal_does_not_end_training(corpus, stream):
    """To the very end of a process, where Python flushes; tests/stories/faults has the rest."""
    command = f"{sys.executable} -m lmtrain train config.yaml training.max_steps=3 --run-dir run {stream}"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((corpus / "run" / "last.json").read_text())["step"] == 3


def test_a_lost_stderr_changes_no_exit_code():
    """Python exits with 120 if it can't flush what a stream still holds (with PYTHONUNBUFFERED it holds nothing)."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*COMMAND, "generate", "no-such-run"], stdout=writer, stderr=writer, env=buffered)
    os.close(writer)
    assert done.returncode == 4


def test_on_a_terminal_there_is_a_bar_and_no_control_character_out_of_the_model(corpus):
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))  # Windows lacks them
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
    assert re.search(rb"\r[^\r\n]*step[^\r\n]*tokens/s[^\r\n]*\r", said)  # drawn over again
    assert escape("a\x1b[2Jb\x07\x9b\r\n\tc한") == "a\\x1b[2Jb\\x07\\x9b\\x0d\n\tc한"


@given(st.text(st.one_of(st.characters(categories=["Cc", "Cf", "Cs", "Zl"]), st.characters())))
def test_escaped_text_holds_no_control_character_and_all_else(text):
    escaped = escape(text)
    assert not [each for each in escaped if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    written_out = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})")
    plain = [written_out.sub(lambda code: chr(int(code[1] or code[2], 16)), each) for each in (escaped, text)]
    assert plain[0] == plain[1]


def test_help_is_quick():
    """A bound that only an import of torch would break (1.5 s); scripts/benchmark.py is for real timings."""
    best = min(_seconds() for _ in range(3))
    assert best < 1.0


def _seconds():
    started_s = time.perf_counter()
    lmtrain("--help")
    return time.perf_counter() - started_s
