"""The house: imports point down only, torch stays out of the shell, nothing unsafe is called."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# from the ground up: a file imports from rooms that stand before its own, and within its own without a circle
ROOMS = [
    "errors",
    "metrics",
    "model",
    "system",
    "config",
    "data.arrays",
    "data.text",
    "data.tokenizers",
    "data.store",
    "data.batches",
    "data.preparation",
    "runs",
    "inference",
    "training",
    "check",
    "__init__",
    "cli",
    "__main__",
]
FILES = {
    ".".join(path.relative_to(ROOT / "lmtrain").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lmtrain").rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name in ("lmtrain", "config", "cli")  # others import nothing
}


def room_of(module: str) -> str:
    """The room that a file stands in: the longest of the names above that it begins with."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imported(path: Path) -> set[str]:
    """The modules of lmtrain that a file imports, lazy imports and those for type checking counted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmtrain":
            home = node.module.removeprefix("lmtrain").removeprefix(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                found.add(inner if inner in FILES else home or "__init__")
        elif isinstance(node, ast.Import) and "lmtrain" in [alias.name for alias in node.names]:
            found.add("__init__")
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    floor = ROOMS.index(room_of(module))
    assert not {other for other in imported(FILES[module]) if ROOMS.index(room_of(other)) > floor}


def test_imports_go_in_no_circle():
    assert len(list(TopologicalSorter({module: imported(path) for module, path in FILES.items()}).static_order())) > 80


def test_the_walk_sees_imports():
    assert "data.batches.rows" in imported(FILES["data.batches.streams"])


@pytest.mark.parametrize("code", ["import lmtrain", "import lmtrain.cli", "import lmtrain.config"])
def test_torch_is_not_imported_before_it_is_needed(code):
    script = f"import sys; {code}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_files_stay_small():
    assert [name for name, path in FILES.items() if len(path.read_text().splitlines()) > 380] == []


def test_nothing_unsafe_is_called():
    banned = {"pickle", "eval", "exec", "marshal"}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id not in banned, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("yaml", "load")}, path
