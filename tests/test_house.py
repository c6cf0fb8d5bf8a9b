"""The house: imports point down only, torch stays out of the shell, nothing unsafe is called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# a file may import from files that stand before it; one row is one floor of the house
FLOORS = [
    ["errors", "metrics"],
    [
        "model.packing",
        "model.products",
        "model.states",
        "model.events",
        "model.dropout",
        "model.embedding",
        "model.ngrams",
        "model.counts",
        "model.kernels",
        "model.recurrence",
        "model.directions",
        "model.output",
        "model.language_model",
    ],
    [
        "system.console",
        "system.files",
        "system.progress",
        "system.signals",
        "system.device",
        "system.processes",
    ],
    [
        "config.located_yaml",
        "config.schema",
        "config.contradictions",
        "config.loading",
        "config",
    ],
    [
        "data.tokens.words",
        "data.tokens.library",
        "data.tokens.pieces",
        "data.tokenizer",
        "data.paging",
        "data.reading",
        "data.digests",
        "data.source",
        "data.building.encoding",
        "data.building.counting",
        "data.building.messages",
        "data.building.worker",
        "data.building.workers",
        "data.building.store",
        "data.corpus",
        "data.building.vocabulary",
        "data.preparation",
        "data.excerpts",
        "data.batching",
        "data.windows",
        "data.sampling",
        "data.streaming",
        "data.feeding",
    ],
    [
        "runs.environment",
        "runs.checkpoint",
        "runs.directory",
        "runs.ngram_counts",
        "runs.weights",
        "runs.loading",
    ],
    [
        "inference.prompts",
        "inference.sampling",
        "inference.generation",
        "inference.beam",
        "inference.filling",
        "inference.scoring",
        "inference.vectors",
        "inference.export",
        "inference.adaptation",
        "inference.trained_model",
    ],
    [
        "training.muon",
        "training.optimization",
        "training.tracking",
        "training.averaging",
        "training.figures",
        "training.parallel",
        "training.validation",
        "training.state",
        "training.checkpointer",
        "training.trainer",
        "training.start",
    ],
    ["check.cost", "check.configuration", "check.run"],
    ["cli.terminal", "cli.training", "cli.generation", "cli.inference", "cli", "__main__"],
]
ORDER = [module for floor in FLOORS for module in floor]
FILES = {
    ".".join(path.relative_to(ROOT / "lmtrain").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lmtrain").rglob("*.py"))
    if path.name != "__init__.py" or path.parent.name in ("config", "cli")  # other folders import nothing of their own
}


def imported(path: Path) -> set[str]:
    """The modules of lmtrain that a file imports, lazy imports and those for type checking counted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmtrain":
            home = node.module.removeprefix("lmtrain").removeprefix(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                found.add(inner if inner in FILES else home)
    return found - {""}


def test_every_file_has_its_floor():
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module):
    above = {other for other in imported(FILES[module]) if ORDER.index(other) >= ORDER.index(module)}
    assert not above


def test_the_walk_sees_imports():
    assert "data.batching" in imported(FILES["data.streaming"])


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
