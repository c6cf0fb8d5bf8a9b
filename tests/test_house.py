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


# what Windows, macOS or both lack; `mypy --platform win32` (see .ci/run) knows them all, and takes a minute
SOME_SYSTEMS_LACK = {
    "modules": {"_winapi", "curses", "fcntl", "grp", "msvcrt", "posix", "pty", "pwd", "resource", "termios", "winreg"},
    "ctypes": {"CDLL"},
    "mmap": {"MADV_DONTNEED", "MADV_WILLNEED"},
    "multiprocessing": {"fork"},
    "os": {
        "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_TMPFILE", "fchmod", "fdatasync", "fork", "getegid",
        "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "killpg", "lchown", "mkfifo", "nice", "posix_fadvise",
        "posix_fallocate", "pread", "preadv", "pwrite", "sched_getaffinity", "sched_setaffinity", "sendfile", "setsid",
        "statvfs", "sync", "sysconf", "uname", "wait", "waitpid",
    },
    "select": {"epoll", "poll", "select"},  # on Windows of sockets alone
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "alarm", "pause", "setitimer"},
    "socket": {"AF_UNIX"},
    "text": ("/dev/", "/proc/", "/sys/", "/tmp"),
}  # fmt: skip


def unguarded(path: Path) -> list[str]:
    """What a file needs of the system it runs on although some systems lack it, outside of a test for that."""
    source = path.read_text(encoding="utf-8")
    found = []

    def is_guard(node: ast.AST) -> bool:
        if isinstance(node, ast.If | ast.IfExp | ast.BoolOp | ast.With):
            test = node.items[0] if isinstance(node, ast.With) else getattr(node, "test", node)
            words = ast.get_source_segment(source, getattr(test, "context_expr", test)) or ""
            return any(word in words for word in ("sys.platform", "hasattr(", "suppress("))
        return isinstance(node, ast.Try)

    def walk(node: ast.AST, is_guarded: bool) -> None:
        is_guarded = is_guarded or is_guard(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name in SOME_SYSTEMS_LACK["modules"]]
        elif isinstance(node, ast.ImportFrom):
            home = SOME_SYSTEMS_LACK.get(node.module or "", ())
            names = [
                each.name for each in node.names if each.name in home or node.module in SOME_SYSTEMS_LACK["modules"]
            ]
        elif isinstance(node, ast.Attribute):
            home = SOME_SYSTEMS_LACK.get(node.value.id if isinstance(node.value, ast.Name) else "", ())
            # `Path.rename` does not replace a file on Windows: `move` of system/files.py does
            names = [node.attr] if node.attr in home or node.attr == "rename" else []
        elif isinstance(node, ast.Constant) and str(node.value).startswith(SOME_SYSTEMS_LACK["text"]):
            names = [str(node.value)]
        found.extend(f"{path.name}:{node.lineno}: {name}" for name in names if not is_guarded)
        for child in ast.iter_child_nodes(node):
            walk(child, is_guarded)

    walk(ast.parse(source), False)
    return found


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_needed_that_a_system_lacks(module):
    assert unguarded(FILES[module]) == []


def test_what_a_system_lacks_is_found(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("""
import os, sys, signal, fcntl
from resource import getrusage
from os import statvfs
with open("/proc/self/status"): os.sched_getaffinity(0)
names = [signal.SIGHUP, path.rename(name)]
if sys.platform != "win32":
    import fcntl
    os.fork()
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
try:
    import resource
except ImportError:
    pass
""")
    assert [name.partition(": ")[2] for name in unguarded(path)] == [
        "fcntl", "getrusage", "statvfs", "/proc/self/status", "sched_getaffinity", "SIGHUP", "rename",
    ]  # fmt: skip


def test_nothing_unsafe_is_called():
    for module, path in FILES.items():
        banned = {"pickle", "eval", "exec", "marshal"}
        if module == "system.workers":
            banned -= {"pickle"}  # for messages between processes of one lmtrain, never for what a file holds
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                assert node.id not in banned, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("yaml", "load")}, path
