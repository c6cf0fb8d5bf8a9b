"""Which device is chosen and why; what a process keeps is set for a training and set back."""

import os
import re
import subprocess
import sys

import pytest
import torch

from lmtrain.errors import ConfigError
from lmtrain.model.cells import CELLS
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.environment import device_of
from lmtrain.system import device as device_module
from lmtrain.system.device import (
    Layer,
    choose_device,
    choose_precision,
    faster_device,
    random_state,
    scoped_settings,
    seed_generators,
    set_random_state,
)
from lmtrain.system.processes import TORCHRUN_VARIABLES
from lmtrain.system.variables import set_variables
from lmtrain.training.start import train

CPU = torch.device("cpu")


@pytest.fixture
def apple(monkeypatch):
    """PyTorch says that this machine has Apple's GPU and no CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)


def test_processes_that_train_together_are_refused_on_apples_gpu(apple, monkeypatch):
    assert choose_device("mps") == torch.device("mps", 0)
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"device mps: .*torchrun"):
        choose_device("mps")
    assert choose_device("auto", Layer("lstm", 8, 4)) == CPU


def test_auto_does_not_take_apples_gpu_unmeasured(apple):
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_of_the_run_is_timed_on_both_devices(cell):
    notes = []
    assert faster_device(CPU, Layer(cell, 24, 5), notes.append) == CPU
    assert len(notes) == 1
    assert re.fullmatch(r"device cpu: a layer of 24 over 5 rows takes [\d.]+ ms on cpu, [\d.]+ ms on the CPU", notes[0])


@pytest.mark.parametrize(("begun_on", "kept"), [("cpu", "cpu"), ("mps", "mps")])
def test_a_resumed_run_keeps_to_the_device_on_which_it_was_begun(apple, small, tmp_path, begun_on, kept):
    run = RunDirectory(tmp_path)
    run.write_environment({"device": begun_on})
    assert device_of(small("training.device=auto"), run=run).type == kept


def test_settings_are_set_back_after_a_fault():
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), scoped_settings(CPU, num_threads=2):  # noqa: PT012
        assert torch.get_num_threads() == 2
        seed_generators(7, CPU)
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_draws_the_same_whatever_was_drawn_before(small, tmp_path):
    figures = []
    for number in (1, 2):
        torch.manual_seed(number)
        figures.append(train(small("training.max_steps=4"), tmp_path / str(number)).figures)
    assert figures[0] == figures[1]


def test_random_state_is_set_back():
    state = random_state(CPU)
    first = torch.rand(4)
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(4), first)


def test_seeding_leaves_other_devices_alone():
    """`torch.manual_seed` would seed CUDA once it is used: its next numbers would not be the host program's own."""
    code = (
        "import torch; from lmtrain.system.device import seed_generators; seed_generators(5, torch.device('cpu')); "
        "from torch.cuda import _queued_calls; print(len(_queued_calls))"
    )
    clean = "import torch; from torch.cuda import _queued_calls; print(len(_queued_calls))"
    counts = [subprocess.run([sys.executable, "-c", each], capture_output=True, text=True) for each in (code, clean)]
    assert counts[0].stdout == counts[1].stdout != ""
    assert torch.equal(_drawn(lambda: seed_generators(5, CPU)), _drawn(lambda: torch.manual_seed(5)))


def _drawn(seed):
    state = random_state(CPU)
    seed()
    drawn = torch.rand(5)
    set_random_state(state, CPU)
    return drawn


@pytest.mark.parametrize(("system", "fallback"), [("linux", None), ("darwin", "1")])
def test_variables_are_set_unless_the_user_has_set_them(monkeypatch, system, fallback):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "")  # is put back at the end, whatever was set
    for own in (None, ":4096:2"):
        monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own or "")
        if own is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        set_variables()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (own or ":4096:8")
        assert os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == fallback
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")


def test_the_command_line_sets_variables_before_pytorch_is_imported():
    code = (
        "import os, sys, lmtrain.cli; sys.argv = ['lmtrain', '--version']\n"
        "try: lmtrain.cli.main()\n"
        "except SystemExit: print('torch' in sys.modules, os.environ['CUBLAS_WORKSPACE_CONFIG'])\n"
        "import warnings; warnings.warn('aten::new falls back to the CPU\\nTriggered at MPSFallback.mm')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[1:] == ["False :4096:8"]
    assert done.stderr == "warning: aten::new falls back to the CPU\n"  # a warning of PyTorch's is one line


def test_a_workspace_that_sums_in_another_order_is_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for value, count in ((":16:8", 0), (":4096:8", 0), (":4096:2", 1), (None, 1)):
        if value is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        else:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        notes: list[str] = []
        assert choose_device("auto", notify=notes.append) == torch.device("cuda", 0)
        assert len(notes) == count


@pytest.mark.parametrize(
    ("bf16_s", "chosen", "products"),
    [([2.0], "fp32", 2), ([0.1, *[0.001] * 99], "bf16", None), ([0.3, *[0.05] * 99], "fp32", 2)],
    ids=["emulated", "prepared slowly", "slower anyway"],
)
def test_a_hopelessly_slow_bf16_is_tried_once(monkeypatch, bf16_s, chosen, products):
    taken_s, calls = iter(bf16_s), list[torch.dtype]()

    def timed(device, left, right):
        calls.append(left.dtype)
        return 0.02 if left.dtype == torch.float32 else next(taken_s)

    monkeypatch.setattr(device_module, "_product_seconds", timed)
    monkeypatch.setattr(device_module, "has_onednn", lambda dtype: True)
    assert choose_precision("auto", CPU, 8)[0] == chosen
    assert products is None or len(calls) == products
    monkeypatch.setattr(device_module, "has_onednn", lambda dtype: False)
    assert choose_precision("auto", CPU, 8) == ("fp32", "oneDNN has no bf16 products for this processor")
    assert products is None or len(calls) == products  # none more
