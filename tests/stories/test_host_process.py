"""A program that imports and calls lmtrain finds its own process as it left it."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_using_lmtrain_as_a_library_changes_nothing_of_its_host_process(corpus, device):
    program = [sys.executable, str(ROOT / "tests/stories/host_process.py"), device]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
