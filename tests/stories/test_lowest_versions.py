"""The lowest versions that `pyproject.toml` allows pass the fast tests of every room.

A virtual environment gets them, all but PyTorch's: its lowest version takes several GB on some machines. So PyTorch and
what it alone needs are linked from the environment that runs this test; its version is in the line that is printed.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ["check", "cli", "config", "data", "inference", "model", "runs", "system", "training"]
NOT_TESTED_WITH = {"torch", "lmtrain", "ruff", "mypy"}  # the last two read the code and do not run it


def lowest_versions():
    """{"numpy": "1.26", ...} of all packages with which lmtrain and its tests run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    found = {match[1]: match[2] for line in lines if (match := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line))}
    return {name: version for name, version in found.items() if name not in NOT_TESTED_WITH}


def link_pytorch(site, left_out):
    """Link PyTorch, and the packages that it needs and that are not left out, into a folder of packages."""
    names, seen = ["torch"], set(left_out)
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # not needed on this system
            continue
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
        names += [re.match(r"[\w.-]+", line)[0] for line in package.requires or () if "extra ==" not in line]


@pytest.mark.slow
def test_the_lowest_versions_pass_the_fast_tests(tmp_path):
    lowest = lowest_versions()
    assert {"numpy", "pydantic", "typer", "tokenizers", "onnx", "pytest"} < lowest.keys()
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    outer = ("PYTHON", "PYTEST")  # what this test runs with is not for that process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}

    def run(*arguments):
        command = [str(python), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    link_pytorch(site, lowest)
    (site / "lmtrain.pth").write_text(f"{ROOT}\n")  # as if it were installed
    pins = [f"{name}=={version}" for name, version in lowest.items()]
    installed = run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins)
    if "from versions: none" in installed.stderr:
        pytest.skip("no package registry can be reached from here")
    assert installed.returncode == 0, installed.stderr
    show = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    versions = json.loads(run("-c", show, *lowest, "torch").stdout)
    print(versions)
    for name, version in lowest.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", versions[name]), name
    done = run("-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{folder}" for folder in FOLDERS))
    assert done.returncode == 0, done.stdout[-8000:]
    print(done.stdout.splitlines()[-1])
