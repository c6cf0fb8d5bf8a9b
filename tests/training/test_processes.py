"""Several processes train as one does, end together, and are resumed as if they had never been stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.batches.loader import RankShard
from lmtrain.training.checkpointer import Checkpointer
from lmtrain.training.optimization import clip_gradient
from tests.conftest import SMALL
from tests.oracle import digest
from tests.stories.faults.ground import Ground, until

TOGETHER_S = 30  # in which all have to end after a fault in one
ONE_DIRECTION = "model.bidirectional=false"
CURVES = {
    "two directions": [],
    "counted n-grams": ["model.ngram_counts=4"],
    "by tokens, penalties, gru": [
        "batching.max_tokens=70", "regularization.temporal_penalty=0.5", "regularization.activation_penalty=0.5",
        "regularization.label_smoothing=0.1", "model.cell=gru", "model.layer_norm=true",
    ],
    "stream, random chunks, n-grams, muon, averaged": [
        "batching.mode=stream", "batching.batch_size=8", "batching.bptt=7", "batching.random_bptt=true", ONE_DIRECTION,
        "model.ngram_embeddings=[2, 3]", "model.ngram_counts=4", "model.recent_tokens=40", "optimizer.name=muon",
        "averaging.name=ema",
    ],
    "carried lines, sparse embedding": [
        "batching.carry_state=true", ONE_DIRECTION, "optimizer.name=sgd", "optimizer.lr=0.3",
        "optimizer.weight_decay=0.0", "model.tie_weights=false",
    ],
    "adaptive, accumulating": ["model.output=adaptive", "model.tie_weights=false", "training.accumulate=2"],
}  # fmt: skip
LONG = ["model.dropout=0", "training.max_epochs=20", "training.max_steps=50", "checkpoint.every_steps=null"]


def ended(processes, within_s=TOGETHER_S):
    """The exit codes of all, and what they said."""
    start_s = time.monotonic()
    codes = [process.wait() for process in processes]
    assert time.monotonic() - start_s < within_s
    return codes, [process.said for process in processes]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def ground(tmp_path):
    def make(*more):
        return Ground(tmp_path / "ground", more, wanted="")

    return make


EVERYDAY = "stream, random chunks, n-grams, muon, averaged"


@pytest.mark.parametrize(
    "more",
    [pytest.param(more, id=name, marks=[] if name == EVERYDAY else pytest.mark.slow) for name, more in CURVES.items()],
)
def test_the_same_training_whatever_the_number_of_processes(ground, more):
    """Loss, gradient norm and validation at every step, to rounding; and one process among torchrun's as one alone."""
    place = ground(*LONG, *more)
    assert place.train(run="alone").wait() == 0
    wanted = rows_of(place.directory / "alone")
    assert sum("train/loss" in row for row in wanted) == 50
    for count in (1, 2, 4):
        codes, said = ended(place.together(count, run=f"of-{count}"), 90)
        assert codes == [0] * count, said
        found = rows_of(place.directory / f"of-{count}")
        for row, other in zip(wanted, found, strict=True):
            assert row["step"] == other["step"]
            for tag in ("train/loss", "train/grad_norm", "valid/loss", "valid/fill_accuracy"):
                if tag in row:
                    exact = 0 if count == 1 else 1e-5 if tag.endswith("loss") else 1e-4
                    assert other[tag] == pytest.approx(row[tag], rel=exact), (count, row["step"], tag)


@given(st.integers(1, 300), st.integers(0, 15), st.integers(0, 99))
def test_a_gradient_s_norm_is_the_same_wherever_it_lies(size, place, seed):
    """Under torchrun it lies in the middle of a larger tensor, and MKL sums a dot product in another order there."""
    weight = torch.nn.Parameter(torch.zeros(size))
    weight.grad = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    wanted = clip_gradient([weight], None)
    weight.grad = torch.cat([torch.zeros(place), weight.grad])[place:]
    assert clip_gradient([weight], None) == wanted


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(
            ["batching.mode=stream", "batching.batch_size=9", ONE_DIRECTION, "model.ngram_embeddings=[2]"],
            marks=pytest.mark.slow,
            id="stream",
        ),
    ],
)
def test_a_run_of_three_processes_is_resumed_bit_for_bit_and_by_one_or_two(ground, more):
    place = ground(*more, "training.max_epochs=6")
    codes, said = ended(place.together(3, run="whole"))
    assert codes == [0] * 3, said
    wanted, steps = digest(place.directory / "whole"), rows_of(place.directory / "whole")[-1]["step"]
    killed = place.together(3)
    place.under_way(killed[0], 7)
    killed[1].signal(signal.SIGKILL)
    codes, said = ended(killed)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == codes[2] == 5
    assert sum(text.count("lost another process") for text in said) == 1, said
    assert place.readable() <= 3
    codes, said = ended(place.together(3))
    assert codes == [0] * 3, said
    assert digest(place.run) == wanted
    place.tidy()
    for count in (1, 2):
        if "batching.mode=stream" in more and 9 % count:
            continue
        again = place.together(3, run=f"again-{count}")
        while again[0].process.is_alive() and not (place.directory / f"again-{count}" / "last.json").exists():
            time.sleep(0.003)
        for process in again:
            process.signal(signal.SIGTERM)
        codes, said = ended(again)
        assert codes == [143] * 3, said
        assert sum(text.count("the state is saved") for text in said) == 1
        codes, said = ended(place.together(count, run=f"again-{count}"))
        assert codes == [0] * count, said
        assert f"processes is {count}, was 3" in said[0]
        assert rows_of(place.directory / f"again-{count}")[-1]["step"] == steps


COUNTS_IN_RANK_0 = """
import os, sys
from lmtrain.cli import main
from lmtrain.runs import ngram_counts
if os.environ["RANK"] == "1":
    ngram_counts.count_ngrams = None  # to call it would raise
sys.argv = ["lmtrain", *sys.argv[1:]]
main()
"""


def test_only_rank_0_counts_ngrams_and_the_other_processes_receive_them(ground):
    place = ground("model.ngram_counts=3", "training.max_steps=2")
    assert [each.wait() for each in place.together(2, run="whole")] == [0, 0]
    command = [sys.executable, "-c", COUNTS_IN_RANK_0, "train", "config.yaml", *place.settings, "--run-dir", "run"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    together |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(command, cwd=place.directory, env=os.environ | together | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert digest(place.run) == digest(place.directory / "whole")


def test_a_signal_to_one_process_breaks_off_the_validation_of_all(ground):
    """Rank 0 is writing samples then, for seconds."""
    stream = ["batching.mode=stream", ONE_DIRECTION]  # without an end token
    place = ground(*stream, "validation.every_steps=2", "generation.max_tokens=4000", "training.max_steps=4")
    codes, said = ended(place.together(2, run="whole"))
    assert codes == [0] * 2, said
    stopped = place.together(2)
    place.under_way(stopped[0], 2)
    stopped[0].signal(signal.SIGTERM)
    codes, said = ended(stopped)
    assert codes == [143] * 2, said
    assert sum(text.count("stopped at step 2 by SIGTERM; the state is saved") for text in said) == 1
    assert not [row for row in rows_of(place.run) if "valid/loss" in row]
    codes, said = ended(place.together(2))
    assert codes == [0] * 2, said
    assert digest(place.run) == digest(place.directory / "whole")


BAD = {
    "columns": (["batching.mode=stream", "batching.batch_size=8", ONE_DIRECTION], {}, 2,
                "batching.batch_size: 8 columns can't be divided among 3 processes; use 9"),
    "rows": (["batching.batch_size=2"], {}, 2, "batching.batch_size: 2 rows a step are too few for 3 processes"),
    "no such file": (["data.train=absent.txt"], {}, 2, "absent.txt: no such file"),
    "no number": ([], {"RANK": "first"}, 2, "RANK=first"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "environment", "code", "words"), BAD.values(), ids=BAD)
def test_a_fault_of_all_processes_is_reported_by_one(ground, more, environment, code, words):
    place = ground(*more)
    codes, said = ended(place.together(3, **environment))
    assert codes == [code] * 3, said
    lines = [line for text in said for line in text.splitlines()]
    assert all(words in line for line in lines)
    assert len(lines) == 1 or environment
    assert not place.run.exists()


def test_a_fault_of_one_process_is_reported_by_it_and_ends_all(ground, tmp_path):
    """Other data, no data, another configuration: of one process of three."""
    place, elsewhere = ground(), Ground(tmp_path / "elsewhere", [], wanted="")
    for name, content, code, words in (
        ("train.txt", b"a b\n", 3, "train.txt holds another text here than for rank 0"),
        ("valid.txt", b"a\n\xff", 3, "valid.txt:2:1: not UTF-8 (byte 0xff)"),
        ("train.txt", None, 2, "train.txt: no such file"),
        ("config.yaml", b"data: 3\n", 2, "config.yaml:1:1"),
        ("config.yaml", SMALL.replace("den_size: 8", "den_size: 9").encode(), 2, "model.hidden_size is 9 here and 8"),
    ):
        file = elsewhere.directory / name
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        codes, said = ended(place.together(3, last=elsewhere))
        assert codes == [code] * 3, said
        assert len(said[2].splitlines()) == 1, said
        assert words in said[2]
        assert said[2].startswith("rank 2 on ")
        assert "another" not in said[0] + said[1]
        file.write_bytes((place.directory / name).read_bytes())
        assert not place.run.exists()


def test_nobody_waits_forever(ground):
    """A process that stands still, one that never comes, a port that is in use."""
    place = ground("training.max_epochs=20")
    processes = place.together(3, LMTRAIN_TIMEOUT_S="4")
    place.under_way(processes[0], 3)
    processes[1].signal(signal.SIGSTOP)
    codes, said = ended([processes[0], processes[2]])
    assert codes == [5, 5], said
    assert sum(text.count("lost another process") for text in said) == 1, said
    processes[1].signal(signal.SIGKILL)
    place.readable()
    codes, said = ended(place.together(2, LMTRAIN_TIMEOUT_S="4", WORLD_SIZE="3", RANK="0")[:1])
    assert codes == [5], said
    assert len(said[0].splitlines()) == 1, said
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        codes, said = ended(place.together(1, MASTER_PORT=str(taken.getsockname()[1])))
    assert codes == [5]
    assert "the port is in use" in said[0], said


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_is_killed(ground):
    place = ground("training.max_epochs=12")
    codes, said = ended(place.together(2, run="whole"), 60)
    assert codes == [0, 0], said
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "-m"]
    command += ["lmtrain", "train", "config.yaml", *place.settings]
    for run in ("config", "config-2"):  # the second is not taken for the first
        path = place.directory / "runs" / run
        with subprocess.Popen(
            command, cwd=place.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as started:
            until(lambda path=path: (path / "last.json").exists())
            children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            said = started.communicate(timeout=120)[0].decode()
        assert started.returncode == 0, said
        assert "resumed from step" in said
        assert digest(path) == digest(place.directory / "whole")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=200), st.integers(1, 9))
def test_every_row_is_one_rank_s_and_all_have_about_the_same(lengths, world_size):
    rows = np.sort(lengths)[::-1]
    rows_by_rank = [RankShard(rank, world_size).rows(len(rows)) for rank in range(world_size)]
    assert sorted(np.concatenate(rows_by_rank).tolist()) == list(range(len(rows)))
    tokens = [rows[places].sum() for places in rows_by_rank]
    assert max(tokens) - min(tokens) <= rows[0]
    assert max(map(len, rows_by_rank)) - min(map(len, rows_by_rank)) <= 1


@given(st.integers(1, 6), st.integers(1, 9), st.data())
def test_columns_stay_with_a_rank(each, world_size, data):
    columns = each * world_size
    of_all = [RankShard(rank, world_size, columns).rows(columns) for rank in range(world_size)]
    assert np.concatenate(of_all).tolist() == list(range(columns))
    left = data.draw(st.integers(1, columns))
    for rank, places in enumerate(of_all):
        assert RankShard(rank, world_size, columns).rows(left).tolist() == [place for place in places if place < left]


def test_a_run_on_cpus_is_resumed_on_cuda_in_every_rank(monkeypatch):
    """The checkpoint of a run on CPUs has no random state of a CUDA device, in no rank."""
    device, restored = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(state))
    torch.manual_seed(5)
    training = {"cpu": torch.get_rng_state()}
    torch.manual_seed(6)
    training["cpu/1"] = torch.get_rng_state()
    for rank, key in enumerate(training):
        step, processes = SimpleNamespace(model=None, device=device), SimpleNamespace(rank=rank)
        Checkpointer(None, step, None, None, processes)._restore_random_state(7, training)
        assert torch.equal(torch.get_rng_state(), training[key])
    assert not restored
