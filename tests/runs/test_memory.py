"""What a save, a load and a resume take in memory, beside the weights and the state of the optimizer themselves."""

import json
import os
import subprocess
import sys

import pytest

# a model of 100 million weights, most of them in one tensor, and AdamW's two moments of each
CONFIG = """
data: {train: ids.txt, valid: null, cache_dir: cache}
tokenizer: {kind: ids, vocab_size: 160000}
model: {embedding_size: 512, hidden_size: 1024, num_layers: 2}
training: {num_threads: 2, precision: fp32, device: cpu}
"""
DRIVER = """
import json, sys
from pathlib import Path
import torch
import lmtrain
from lmtrain.config import load_config
from lmtrain.data.preparation import prepare
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.weights import build_model
from lmtrain.system.processes import SingleProcess
from lmtrain.training.checkpointer import Checkpointer
from lmtrain.training.optimization import optimizer_step
from lmtrain.training.state import TrainingState
from lmtrain.training.step import TrainingStep

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

def measured(action):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    kept = action()
    return kept, resident("VmHWM") - before

config, run = load_config("config.yaml"), RunDirectory(Path("run"))
corpora = prepare(config, lambda line: None)
torch.set_num_threads(config.training.num_threads)

def checkpointer():
    model = build_model(config, corpora.tokenizer.vocab_size)
    return Checkpointer(run, TrainingStep(config, model), corpora, config, SingleProcess())

build_model(load_config("config.yaml", ["tokenizer.vocab_size=9", "model.hidden_size=9"]), 9)  # what PyTorch imports
what = sys.argv[1]
if what == "save":
    training = checkpointer()
    for weight in training.model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer_step(training.step.optimizers)
    run.path.mkdir()
    run.write_start(config, corpora.tokenizer, {})
    _, peak = measured(lambda: training.save(TrainingState(step=1), {}, {}))
elif what == "load":
    model, peak = measured(lambda: lmtrain.load("run"))
elif what == "resume":
    def resume():
        training = checkpointer()
        assert training.restore(lambda line: None) is not None
        return training
    training, peak = measured(resume)
elif what == "roll back":
    training = checkpointer()
    training.restore(lambda line: None)
    _, peak = measured(lambda: training.roll_back(1, lambda line: None))
else:
    from lmtrain.check.run import inspect_run
    _, peak = measured(lambda: list(inspect_run(run)))
print(json.dumps(peak))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps no peak of memory")
def test_files_are_written_and_read_in_little_memory(tmp_path):
    """Peaks above what the process held before: with 100 million weights, a save needed 5.1 times the weights, a load
    2.9 times, a resume 6.1 times (of which 3 are kept), when whole files were held."""
    (tmp_path / "ids.txt").write_text("5 6 7\n" * 40)
    (tmp_path / "config.yaml").write_text(CONFIG)

    def peak(what):
        command = [sys.executable, "-c", DRIVER, what]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    peaks = {"save": peak("save")}
    saved = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    weights, training = ((saved / f"{name}.safetensors").stat().st_size for name in ("model", "training"))
    print(f"\nweights {weights >> 20} MiB, optimizer {training >> 20} MiB")
    for what in ("load", "resume", "roll back", "check"):
        peaks[what] = peak(what)
    kept = {"save": 0, "load": weights, "resume": weights + training, "roll back": 0, "check": 0}
    for what, bytes in peaks.items():
        print(f"{what}: {bytes >> 20} MiB more, {bytes / weights:.2f} times the weights, {kept[what] >> 20} MiB kept")
    for what, bytes in peaks.items():
        assert bytes < 1.2 * kept[what] + 0.2 * weights, what
