"""`lmtrain prepare`, and preparing as a part of training: without torch, and without running a script twice."""

import json
import subprocess
import sys


def test_preparing_loads_no_torch():
    for module in ("data.store.encoding", "data.tokenizers.counting", "data.preparation", "system.workers"):
        script = f"import sys, lmtrain.{module}; print('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


SCRIPT = """
import sys
from lmtrain.data.text import reading
from lmtrain.system import workers
workers.FEW_BYTES, workers.core_count, reading.BLOCK_BYTES = 0, lambda: 3, 1000
start, started = workers._Worker.__init__, []
workers._Worker.__init__ = lambda worker: start(worker) or started.append(worker)
import lmtrain
print("at the top level")
lmtrain.train(lmtrain.load_config("config.yaml", ["training.max_steps=1"]))
print(len(started), "workers")
"""


def test_a_script_without_a_guard_is_run_once_and_not_by_its_workers(corpus):
    """`multiprocessing` would run it again in each worker."""
    (corpus / "script.py").write_text(SCRIPT)
    for name in ("random.py", "struct.py", "lmtrain.py"):  # nor do workers import files of the working directory
        (corpus / "here").mkdir(exist_ok=True)
        (corpus / "here" / name).write_text("raise SystemExit('not mine')")
    for name in ("train.txt", "valid.txt", "config.yaml"):
        (corpus / name).rename(corpus / "here" / name)
    done = subprocess.run(
        [sys.executable, corpus / "script.py"], cwd=corpus / "here", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "at the top level\n9 workers\n"), done.stderr


def test_prepare_does_all_that_train_would_read(small, shell):
    done = shell("prepare", "config.yaml", "data.test=valid.txt", "--json")
    assert (done.returncode, done.stderr.splitlines()[:2]) == (
        0,
        ["learning the word vocabulary from train.txt", "reading train.txt"],
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["store"], row["sequences"], row["built"]) for row in rows] == [
        ("train", 43, True),
        ("valid", 9, True),
        ("test", 9, False),
    ]
    messages = shell("prepare", "config.yaml").stdout.splitlines()
    assert messages[0] == "vocabulary: 12 tokens (word)"
    assert messages[1].startswith("train: 43 sequences, ")
    assert messages[-1] == "Next: lmtrain train config.yaml"
    trained = shell("train", "config.yaml", "training.max_steps=1")
    assert "reading" not in trained.stderr


def test_prepare_loads_no_torch(corpus):
    script = (
        "import sys; sys.argv = ['lmtrain', 'prepare', 'config.yaml']\n"
        "from lmtrain.cli import _run; assert _run() == 0; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=corpus)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
