"""What only a CUDA device can show of a training: bits, numbers, waits, memory, processes. See ../README.md."""

import json
import re
import socket
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmtrain.runs import checkpoint
from lmtrain.training.checkpointer import Checkpointer
from lmtrain.training.start import train
from tests.conftest import ROOT, sentences
from tests.oracle import digest
from tests.training.test_training import SETTINGS

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
ON = f"training.device={DEVICE}"
ONE_DIRECTION = "model.bidirectional=false"
ONCE_IN_2_11 = "Sparse invariant checks are implicitly disabled"  # PyTorch 2.11 says so even if told to disable them
STREAM = ["batching.mode=stream", "batching.bptt=9", ONE_DIRECTION]


def lmtrain(*arguments):
    """The command line in a process of its own, with what it says."""
    command = [sys.executable, "-m", "lmtrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# ---- bits


ON_CUDA = SETTINGS | {
    "sampled, muon, weight dropout": [
        "training.sampled_tokens=4", "training.frequent_tokens=2", "optimizer.name=muon",
        "regularization.weight_dropout=0.3", "averaging.name=ema",
    ],
    "sparse embedding, residual": [
        "optimizer.name=sgd", "optimizer.weight_decay=0", "model.tie_weights=false", "model.residual=true",
    ],
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", ON_CUDA.values(), ids=ON_CUDA)
def test_a_seed_gives_one_run_and_a_resume_the_same_bits(small, tmp_path, settings, precision):
    """Twice in this process, and once stopped and resumed in another, since cuDNN keeps state in one; no warnings."""
    overrides = [*settings, ON, f"training.precision={precision}"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        wanted = digest(train(small(*overrides), tmp_path / "whole").run)
        assert digest(train(small(*overrides), tmp_path / "again").run) == wanted
        train(small(*overrides), tmp_path / "cut", stop_at_step=5)
    said = [f"{each.filename}:{each.lineno}: {each.message}" for each in warned]
    assert [line for line in said if ONCE_IN_2_11 not in line] == []
    resumed = lmtrain("train", "config.yaml", *overrides, "--run-dir", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Warning" not in resumed.stderr.replace(f"UserWarning: {ONCE_IN_2_11}", ""), resumed.stderr
    assert digest(tmp_path / "cut") == wanted


# ---- numbers


def gradient(small, run, *settings, scale=1.0):
    """The gradient of one step by weight, as the change of the weights by SGD, divided by the scale of the loss."""
    weights = []
    for rate in (1e-30, 1 / scale):
        config = small(
            ON, "data.valid=null", "training.max_steps=1", "optimizer.name=sgd", "optimizer.clip_grad_norm=null",
            "optimizer.weight_decay=0", f"optimizer.lr={rate}", "schedule.name=constant", "schedule.warmup_steps=0",
            "model.dropout=0", "model.hidden_size=64", "model.embedding_size=48", "batching.batch_size=4",
            *(f"training.loss_weights.{name}={scale}" for name in ("forward", "backward", "fill")), *settings,
        )  # fmt: skip
        path = train(config, run.with_name(f"{run.name}-{rate:g}")).run
        weights.append(checkpoint.load(path / "checkpoints", 1).model)
    return {name: start - weights[1][name] for name, start in weights[0].items()}


def apart(one, other):
    """The largest relative distance between two gradients of one weight."""
    distances = {name: float((one[name] - other[name]).norm() / other[name].norm()) for name in other}
    return max(distances.items(), key=lambda each: each[1])


@pytest.mark.parametrize("more", [[], STREAM], ids=["sentences", "stream"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_gradients_in_bf16_are_near_those_in_fp32_and_none_is_flushed_to_zero(small, tmp_path, cell, more):
    """bf16 keeps 8 bits, so a gradient may be off by 3 %; its exponents are those of fp32. A loss that is 2**-24 times
    as large has gradients that are exactly so; in fp16 most of them would be zero (its smallest number is 2**-24)."""
    fp32, bf16 = ([*more, f"model.cell={cell}", f"training.precision={each}"] for each in ("fp32", "bf16"))
    exact = gradient(small, tmp_path / "fp32", *fp32)
    rounded = gradient(small, tmp_path / "bf16", *bf16)
    assert apart(rounded, exact)[1] < 0.03, apart(rounded, exact)
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    for name, settings, whole in (("tiny-fp32", fp32, exact), ("tiny-bf16", bf16, rounded)):
        tiny = gradient(small, tmp_path / name, *settings, scale=2.0**-24)
        assert apart(tiny, whole)[1] < 1e-3, (name, apart(tiny, whole))


class Dtypes(TorchDispatchMode):
    """Notes the floating-point types of the tensors that reach each of PyTorch's functions, below autocast."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.seen.setdefault(function.overloadpacket.__name__, set()).add(each.dtype)
        return result


@pytest.mark.parametrize("more", [[], STREAM], ids=["sentences", "stream"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_computed_in_fp16(small, tmp_path, precision, cell, more):
    """PyTorch's autocast hands fp16 to cuDNN's recurrent layers, whatever was asked; lmtrain never does."""
    with Dtypes() as dtypes:
        train(small(*more, ON, f"model.cell={cell}", f"training.precision={precision}"), tmp_path / "run")
    assert not [name for name, seen in dtypes.seen.items() if torch.float16 in seen]
    assert any(torch.bfloat16 in seen for seen in dtypes.seen.values()) == (precision == "bf16")
    recurrent = {name: sorted(map(str, seen)) for name, seen in dtypes.seen.items() if "rnn" in name}
    print(precision, cell, recurrent)
    assert recurrent or DEVICE == "cpu"  # cuDNN's functions are seen here


# ---- waits and memory


def waits_of(small, run, steps, *settings):
    """The lines at which PyTorch says that a training of this many steps waited for the device, and how often."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(small(*settings, ON), run, stop_at_step=steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{each.filename}:{each.lineno}" for each in warned if str(each.message).startswith("called a sync"))


WAITS = {
    "two directions": [],
    "stream, all dropouts": [
        *STREAM, "regularization.input_dropout=0.2", "regularization.weight_dropout=0.3",
        "regularization.embedding_dropout=0.1", "regularization.temporal_penalty=0.5", "averaging.name=ema",
    ],
    "muon, n-grams": [ONE_DIRECTION, "model.ngram_embeddings=[2, 3]", "model.ngram_counts=3", "optimizer.name=muon"],
    "accumulating, gru": ["model.cell=gru", "training.accumulate=2"],
    "sampled": [ONE_DIRECTION, "training.sampled_tokens=4", "training.frequent_tokens=2"],
    "adaptive": [ONE_DIRECTION, "model.output=adaptive", "model.tie_weights=false"],
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", WAITS.values(), ids=WAITS)
def test_a_step_waits_for_the_device_once_at_most(small, corpus, tmp_path, settings, precision):
    """Nothing is logged, validated or saved between the 5th and the 25th step."""
    (corpus / "train.txt").write_text(sentences(500, seed=1))
    more = [
        f"training.precision={precision}",
        "data.valid=null",
        "logging.every_steps=1000",
        "checkpoint.every_steps=null",
    ]
    few, many = (waits_of(small, tmp_path / f"run-{steps}", steps, *settings, *more) for steps in (5, 25))
    assert few  # the start waits, and PyTorch says so
    print(many - few)
    assert sum((many - few).values()) <= 20, many - few


LARGE = [
    ONE_DIRECTION, "model.embedding_size=1000", "model.hidden_size=1000", "logging.sample_prompts=[]",
    "data.valid=null", "checkpoint.every_steps=null",
]  # fmt: skip


def host_bytes(field):
    """A field of this process's status: VmHWM is the peak of its memory, VmRSS the memory now."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def test_memory_of_a_step_and_of_a_save(small, tmp_path, monkeypatch):
    """A step needs weights, gradients, optimizer and little more; a save nothing on the device, and on the host at most
    1.2 times what is saved."""
    noted = {}
    save = Checkpointer.save

    def measured(self, *arguments):
        noted["step"] = torch.cuda.max_memory_allocated()
        noted["saved"] = 3 * 4 * sum(weight.numel() for weight in self.step.model.parameters())
        before, host_before = torch.cuda.memory_allocated(), host_bytes("VmRSS")
        torch.cuda.reset_peak_memory_stats()
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
        save(self, *arguments)
        noted["device"] = torch.cuda.max_memory_allocated() - before
        noted["host"] = host_bytes("VmHWM") - host_before

    monkeypatch.setattr(Checkpointer, "save", measured)
    torch.cuda.reset_peak_memory_stats()
    train(small(*LARGE, ON, "training.max_steps=3"), tmp_path / "run")
    print({name: f"{bytes_ / 1e6:,.0f} MB" for name, bytes_ in noted.items()})
    assert noted["step"] < 5 / 3 * noted["saved"] + 200e6  # gradients, new and summed, beside what is saved
    assert noted["device"] < 0.1 * noted["saved"]  # a weight at a time is looked at
    assert noted["host"] < 1.2 * noted["saved"]


@pytest.mark.parametrize("command", ["train", "check"])
def test_out_of_memory_on_the_device_is_one_line(small, command):
    """With a device of 150 MB, as PyTorch is told."""
    code = (
        "import sys, torch; from lmtrain.cli import main\n"
        "torch.cuda.set_per_process_memory_fraction(150e6 / torch.cuda.get_device_properties(0).total_memory)\n"
        f"sys.argv = {['lmtrain', command, 'config.yaml', *LARGE, ON]!r}\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("out of memory: "), done.stderr


def test_check_says_what_a_step_needs_on_the_device(small):
    done = lmtrain("check", "config.yaml", *LARGE, ON)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    (megabytes,) = re.findall(r"memory: about ([\d,]+) MB on the device", done.stdout)
    assert 256 < int(megabytes.replace(",", "")) < 500  # 16 million weights, 16 bytes each


# ---- processes


def torchrun(count, *arguments):
    """`lmtrain train` in several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(port), "--nproc-per-node", str(count)]
    command = [*start, "-m", "lmtrain", "train", "config.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "more",
    [[*STREAM, "model.ngram_embeddings=[2]"], ["batching.carry_state=true", "batching.batch_size=5", ONE_DIRECTION]],
    ids=["stream", "carried lines"],
)
def test_one_process_with_nccl_equals_one_without_torchrun(small, corpus, more):
    """To the bit, but for rows of sentences, which only a process that trains alone pads: see `training/graphs.py`."""
    alone = lmtrain("train", "config.yaml", *more, ON, "--run-dir", "alone")
    assert alone.returncode == 0, alone.stderr
    torchrun(1, *more, ON, "--run-dir", "one")
    assert digest(corpus / "one") == digest(corpus / "alone")


def test_a_run_of_two_processes_on_cpu_is_resumed_on_cuda(small, corpus):
    torchrun(2, "training.max_epochs=1", "--run-dir", "run")
    resumed = lmtrain("train", "config.yaml", ON, "--run-dir", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "was cpu: the result is no longer bit-identical" in resumed.stderr
    assert json.loads((corpus / "run" / "last.json").read_text())["step"] == 12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
@pytest.mark.parametrize("more", [[], [*STREAM, "model.ngram_embeddings=[2]"]], ids=["two directions", "stream"])
def test_two_processes_with_nccl_train_as_one_and_are_resumed_bit_for_bit(small, corpus, monkeypatch, more):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    settings = [*more, ON, "model.dropout=0"]
    for count in (1, 2):
        torchrun(count, *settings, "--run-dir", f"of-{count}")
    one, two = (
        [json.loads(line) for line in (corpus / f"of-{count}" / "metrics.jsonl").read_text().splitlines()]
        for count in (1, 2)
    )
    for row, other in zip(one, two, strict=True):
        for tag in ("train/loss", "train/grad_norm", "valid/loss"):
            assert other.get(tag) == pytest.approx(row.get(tag), rel=1e-4), (row["step"], tag)
    constant = [*more, ON, "schedule.name=constant"]  # the others depend on how long a run is to be
    torchrun(2, *constant, "--run-dir", "whole")
    torchrun(2, *constant, "training.max_epochs=1", "--run-dir", "cut")
    torchrun(2, *constant, "--run-dir", "cut", "--resume")
    assert digest(corpus / "cut") == digest(corpus / "whole")
    torchrun(2, *more, "training.max_epochs=1", "--run-dir", "begun-on-cpu")
    torchrun(2, *more, ON, "--run-dir", "begun-on-cpu", "--resume")


# ---- speed


def test_the_benchmark_prints_its_rows():
    """Other tests run beside it: the figures that count are those of scripts/benchmark.py by itself."""
    command = [sys.executable, "scripts/benchmark.py", "--device", DEVICE, "--quick", "--json"]
    rows = ["equal-lstm-200", "output-layer"]
    done = subprocess.run(
        [*command, *(f"--row={row}" for row in rows)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["row"] for result in results] == rows
    for result in results:
        print(result)
        assert result["ratio"] > 0.2
        assert len(result["device_mb"]) == 2
        assert min(result["device_mb"]) > 0 or DEVICE == "cpu"
        assert result["device"] != "cpu" or DEVICE == "cpu"
