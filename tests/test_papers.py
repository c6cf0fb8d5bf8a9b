"""The papers: links lead somewhere, the map names every file of the package, the first page stays short."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAPERS = [
    "README.md",
    "configs/README.md",
    "configs/recipes/README.md",
    "data/lesson/README.md",
    "lmtrain/README.md",
    "scripts/README.md",
    "tests/README.md",
]


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = [line.lstrip("#").strip().lower() for line in path.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_link_leads_to_a_file_and_a_heading(paper):
    page = ROOT / paper
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if file.startswith("https:"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_the_map_names_the_files_of_the_package_and_no_others():
    page = (ROOT / "lmtrain" / "README.md").read_text()
    map_of_rooms = page.partition("## The map")[2].partition("## ")[0]
    named = {Path(name).name for name in re.findall(r"`([\w/]+\.py)`", map_of_rooms)}
    rooms = {path.name for path in (ROOT / "lmtrain").rglob("*.py")}
    assert named | {"__init__.py"} == rooms
    assert len(named) > 60


def test_the_first_page_is_short_and_has_the_two_commands_of_ci():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220
    assert sum(line.startswith("python -m pip install") for line in lines) == 2


def test_every_test_that_is_pointed_to_is_there():
    """Files of tests named in papers, comments and docstrings: by their path, or by their name alone."""
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    known = tests | {path.removeprefix("tests/") for path in tests} | {Path(path).name for path in tests}
    sources = [ROOT / paper for paper in PAPERS]
    sources += [path for folder in ("lmtrain", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = [(path, name) for path in sources for name in re.findall(r"[\w/]*\btest_\w+\.py\b", path.read_text())]
    assert len(named) > 50
    assert [(str(path), name) for path, name in named if name not in known] == []
