"""Small real things to test on: a corpus, a configuration, a trained run."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from lmtrain.cli import _run as command_line
from lmtrain.config import Config, load_config

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

# in the words of this system, as messages quote them
NO_FILE, NO_SPACE, READ_ONLY = (os.strerror(code).lower() for code in (errno.ENOENT, errno.ENOSPC, errno.EROFS))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores SIGINT, and tests send it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the command line does, before CUDA starts

# a file system in memory, where there is one: thousands of small saves, each of them synced, would wait for the disk
if os.access("/dev/shm", os.W_OK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")

# in the processes that tests start, as in `filterwarnings` of pyproject.toml
DEPRECATED = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
os.environ.setdefault("PYTHONWARNINGS", ",".join(f"error::{kind}" for kind in DEPRECATED))

torch.set_num_threads(1)  # the models here are tiny, and two threads only wait for each other

SMALL = """
data: {train: train.txt, valid: valid.txt, cache_dir: cache}
tokenizer: {kind: word, min_frequency: 1}
batching: {batch_size: 8, bucket_batches: 3}
model: {embedding_size: 6, hidden_size: 8, num_layers: 2, dropout: 0.3, bidirectional: true}
optimizer: {lr: 0.01}
schedule: {warmup_steps: 3}
training: {max_epochs: 2, precision: fp32, num_threads: 1, device: cpu}
checkpoint: {every_steps: 3, every_minutes: null}
logging: {every_steps: 2, sample_prompts: ["", "a b"]}
generation: {max_tokens: 12}
"""


def shared(name: str) -> Path:
    """A folder of the shared corpora; the test is skipped, in words, where it is not there."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the corpus {name} is not beside this checkout (../shared/data/{name})")
    return folder


@cache
def bf16_is_emulated() -> bool:
    """Whether this processor multiplies in bf16 far slower than in fp32, as those without AVX-512 or bf16 do.

    Measured on 128 x 256 x 256: a ratio of 0.3 where bf16 is native, of 30 and more where it is emulated.
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        tries = []
        for _ in range(4):
            start_s = time.perf_counter()
            torch.mm(left, right)
            tries.append(time.perf_counter() - start_s)
        seconds.append(min(tries))
    fp32_s, bf16_s = seconds
    return bf16_s > 5 * fp32_s


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `cuda` is skipped where there is no CUDA device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN multiplies in fp32 to its last digit, not in TF32, which PyTorch allows it by default and which has ten
    bits instead of 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def load_script(name: str) -> Any:
    """A file of scripts/ as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def sentences(count: int, seed: int) -> str:
    """Lines of 1 to 9 words out of eight."""
    chance = random.Random(seed)
    return "".join(" ".join(chance.choices("abcdefgh", k=chance.randint(1, 9))) + "\n" for _ in range(count))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: train.txt, valid.txt and config.yaml of a run of a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text(sentences(43, seed=1))
    (tmp_path / "valid.txt").write_text(sentences(9, seed=2))
    (tmp_path / "config.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def small(corpus: Path) -> Callable[..., Config]:
    """The small configuration, with overrides."""
    return lambda *overrides: load_config("config.yaml", overrides)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line without a process of its own, where there are many of them to run."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["lmtrain", *map(str, arguments)])
        capfd.readouterr()
        code = command_line()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, said.out, said.err)

    return run
