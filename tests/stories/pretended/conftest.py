"""The tests of this folder run on a device that is only pretended, see `tests/pretend_device.py`.

What the device changes in PyTorch it changes for a whole process. So the tests of a file run in a pytest of their own:
the first of them that is reached starts it, for all that are selected, and each then gets the reports that it had
there. To have print and breakpoints, run them in one process:

    LMTRAIN_PRETEND=/dev/null python -m pytest -n 0 tests/stories/pretended
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import pretend_device
from tests.conftest import ROOT

HERE = Path(__file__).parent
REPORTS = os.environ.get("LMTRAIN_PRETEND")  # in a process with the device: the file to which it writes its reports

if REPORTS is not None:
    assert "lmtrain.system.device" not in sys.modules, "the device has to be there before lmtrain's modules are"
    DEVICE = pretend_device.set_up()
    from lmtrain.system import device

    choose_device = device.choose_device
    # lmtrain knows no name for the device: `auto` stands for it
    device.choose_device = lambda name, *more: DEVICE if name == "auto" else choose_device(name, *more)


@pytest.fixture(autouse=True)
def _fresh_device():
    """The device as it is at first: nothing counted, and random numbers from the CPU's generator."""
    if not pretend_device.AVAILABLE:
        pytest.skip(f"PyTorch {torch.__version__} takes no device that is written in Python")
    pretend_device.generator.share()
    pretend_device.waits.clear()
    pretend_device.copies.clear()
    torch.manual_seed(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Write a report to the file of reports."""
    report = yield
    if REPORTS is not None:
        content = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        with open(REPORTS, "a") as file:
            file.write(json.dumps([item.nodeid, content]) + "\n")
    return report


def pytest_runtest_protocol(item, nextitem):
    """Give a test of this folder the reports that it had in the process with the device."""
    if REPORTS is not None or item.path.parent != HERE or not pretend_device.AVAILABLE:
        return None
    hook = item.config.hook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for content in _reports(item):
        report = hook.pytest_report_from_serializable(config=item.config, data=content)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what the item before has set up
    return True


def _reports(item):
    """The reports of a test: what came before it, of itself, and of what came after it."""
    folder = item.config._tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # all workers share it
    reports, said = folder / f"{item.path.stem}.reports", folder / f"{item.path.stem}.txt"
    with FileLock(folder / f"{item.path.stem}.lock"):
        if not said.exists():
            tests = [each.nodeid for each in item.session.items if each.path == item.path]
            command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
            command += ["--basetemp", str(folder / item.path.stem), *tests]
            variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
            variables["LMTRAIN_PRETEND"] = str(reports)
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
            said.write_text(done.stdout[-5000:] + done.stderr[-5000:])
    lines = reports.read_text().splitlines() if reports.exists() else []
    own = [content for nodeid, content in map(json.loads, lines) if nodeid == item.nodeid]
    if own:
        return own
    failed = pytest.TestReport(item.nodeid, item.location, {}, "failed", said.read_text(), "call")
    return [item.config.hook.pytest_report_to_serializable(config=item.config, report=failed)]
