"""`lmtrain check` before a long training: what it costs here, and of large files estimates from pieces of them."""

import gzip
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmtrain.check import configuration, cost
from lmtrain.check.configuration import describe_configuration, describe_duration
from lmtrain.check.cost import Counting, Measured, measure_cost, why_not_measured
from lmtrain.config import load_config
from lmtrain.data.preparation import prepare
from lmtrain.data.store.token_store import ARRAYS
from lmtrain.data.text import excerpts
from lmtrain.errors import ConfigError, DataError
from lmtrain.model.ngrams.counting import COUNTING_BYTES
from lmtrain.runs import ngram_counts
from lmtrain.training.start import train
from lmtrain.training.step import TrainingStep

WORDS = [f"w{number:03}" for number in range(300)]


def lines(count, seed=1):
    """Shuffled lines of 1 to 30 words, blank ones now and then."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(0, 30))) for _ in range(count)]


@pytest.fixture
def large(corpus, monkeypatch):
    """Files of 200 kB are large; a 16th of them is looked at."""
    monkeypatch.setattr(configuration, "LARGE_BYTES", 200_000)
    monkeypatch.setattr(excerpts, "EXCERPT_BYTES", 256 << 10)
    monkeypatch.setattr(excerpts, "PIECE_BYTES", 4 << 10)
    monkeypatch.setattr(tempfile, "tempdir", str(corpus / "temporary"))
    (corpus / "temporary").mkdir()
    return corpus


def report(config):
    """The lines of the report."""
    return [line for finding in describe_configuration(config, print) for line in finding.lines]


def said(config):
    """The report's lines by what stands before their colon."""
    return dict(line.split(": ", 1) for line in report(config) if ": " in line)


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,.]*(?<=\d)", text)]


@pytest.mark.parametrize("kind", ["one", "two", "jsonl", "gz", "fraction", "stream", "byte"])
def test_estimates_are_close_and_leave_nothing_behind(large, kind):
    text = lines(60_000)
    override = {"fraction": ["data.valid=null", "data.valid_fraction=0.2"], "byte": ["tokenizer.kind=byte"]}.get(
        kind, []
    )
    match kind:
        case "jsonl":
            (large / "train.jsonl").write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in text))
            override = ["data.train=train.jsonl"]
        case "gz":
            (large / "train.gz").write_bytes(gzip.compress("\n".join(text).encode()))
            override = ["data.train=train.gz"]
        case "two":
            (large / "a.txt").write_text("\n".join(text[:9000]))
            (large / "b.txt").write_text("\n".join(text[9000:]))
            override = ["data.train=[a.txt, b.txt]"]
        case _:
            (large / "train.txt").write_text("\n".join(text))
    if kind == "stream":
        override = ["batching.mode=stream", "model.bidirectional=false"]
    config = load_config("config.yaml", override)
    found = said(config)
    assert list((large / "temporary").iterdir()) == []
    assert not (large / "cache").exists()
    assert not (large / "runs").exists()
    truth = prepare(config, lambda line: None)
    counts = truth.train.counts
    sequences, tokens, longest, *_ = numbers(found["train"])
    near = 0.08 if kind == "gz" else 0.03  # more of a packed file has been read than unpacked
    assert sequences == pytest.approx(counts.sequences, rel=near)
    assert tokens == pytest.approx(counts.events, rel=near)
    assert longest <= counts.longest
    stores = [store for store in (truth.train, truth.valid) if store is not None]
    size = sum((store.directory / f"{name}.bin").stat().st_size for store in stores for name in ARRAYS)
    assert numbers(found["store"])[0] == pytest.approx(size / 1e6, rel=near)
    assert numbers(found["vocabulary"])[0] == truth.tokenizer.vocab_size
    batches = len(configuration.training_batches(config, truth.train, truth.tokenizer.eos_id).sampler.epoch(0))
    assert numbers(found["batches"])[0] == pytest.approx(batches, rel=near)
    assert {"memory", "time", "preparing"} <= set(found)
    assert ("learnt from these pieces" in found["vocabulary"]) == (kind != "byte")
    assert "about" not in found["valid"] or kind == "fraction"  # what is small is counted
    if kind == "one":  # the tokenizer of all of the text is there now
        assert "learnt" not in said(config)["vocabulary"]


def test_faults_in_the_pieces_are_named_where_they_stand(large):
    text = "\n".join(lines(60_000)).encode()
    middle = text.index(b"\n", len(text) // 2) + 1
    (large / "train.txt").write_bytes(b"a b \xff c\n" + text[:middle] + b"\xff\xff\n" * 20_000 + text[middle:])
    (large / "valid.txt").write_bytes(b"\0")
    with pytest.raises(DataError) as raised:
        list(describe_configuration(load_config("config.yaml"), print))
    first, *more, last = raised.value.faults
    assert first.startswith("train.txt:1:5: not UTF-8 (byte 0xff)")
    assert last.startswith("valid.txt:1:1: a NUL character")
    begins = [re.match(r"train\.txt \(from byte ([\d,]+) on\):1:1: not UTF-8", fault)[1] for fault in more]
    assert any(abs(int(begin.replace(",", "")) - len(text) / 2) < len(text) / 4 for begin in begins)
    (large / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"valid\.txt: no such file"):
        list(describe_configuration(load_config("config.yaml", check_files=False), print))
    assert list((large / "temporary").iterdir()) == []


def test_packed_files_of_several_parts_are_read_on(large):
    text = lines(9000)
    parts = [gzip.compress("".join(f"{line}\n" for line in text[n : n + 900]).encode()) for n in range(0, 9000, 900)]
    (large / "train.gz").write_bytes(b"".join(parts) + bytes(500))
    whole = len("\n".join(text)) + 1
    with excerpts.excerpts_of(load_config("config.yaml", ["data.train=train.gz"])) as taken:
        assert taken.of["train"].all_bytes == pytest.approx(whole, rel=0.15)
        assert taken.of["train"].taken_bytes >= 256 << 10
        found = Path(*taken.of["train"].files).read_text().splitlines()
    assert found == text[: len(found)]


BROKEN = [b"no gzip" * 50_000, gzip.compress(random.Random(1).randbytes(250_000), mtime=0)[:-9]]


@pytest.mark.parametrize("content", BROKEN, ids=["no gzip", "cut short"])
def test_a_packed_file_that_is_broken_is_named(large, content):
    (large / "train.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"^train\.gz: broken gzip file: "):
        list(describe_configuration(load_config("config.yaml", ["data.train=train.gz"]), print))


def test_long_lines_are_taken_whole_and_once(large):
    text = "".join(f"{number} " + "x" * 30_000 + "\n" for number in range(100))
    (large / "train.txt").write_text(text)
    with excerpts.excerpts_of(load_config("config.yaml")) as taken:
        found = "".join(Path(file).read_text() for file in taken.of["train"].files)
        assert taken.of["train"].taken_bytes == len(found)
    assert found.splitlines() == [line for line in text.splitlines() if line in set(found.splitlines())]
    assert len(found.splitlines()) == len(set(found.splitlines())) > 5


@pytest.mark.parametrize("before", [0, 500])
def test_a_line_that_is_too_long_is_said_once_however_many_pieces_it_has(large, monkeypatch, before):
    monkeypatch.setattr(excerpts, "LONGEST_RECORD_BYTES", 50_000)
    (large / "train.txt").write_text("a b\n" * before + "x" * 2_000_000 + "\n" + "a b\n" * 9000)
    with pytest.raises(DataError) as raised:
        list(describe_configuration(load_config("config.yaml"), print))
    (said,) = raised.value.faults
    assert re.fullmatch(rf"train\.txt:{before + 1}: a line of more than 16 MiB; cut it into several, or .*", said)


def test_small_files_are_reported_as_they_are_with_the_cost_of_training(small, corpus, monkeypatch):
    measured = Measured(50.0, 7, 456_789_012, torch.device("cpu"), "fp32")
    monkeypatch.setattr(configuration, "measure_cost", lambda *_: measured)
    events = sum(len(line.split()) + 1 for line in (corpus / "train.txt").read_text().splitlines())
    found = said(small())
    assert found["train"].startswith("43 sequences, ")
    assert found["memory"] == "about 457 MB of the process in training"
    assert found["time"].endswith("50.0 tokens/s over 7 steps (cpu, fp32)")
    assert numbers(found["time"])[:2] == pytest.approx([events / 50, 2 * events / 50], rel=0.01)  # two epochs in all


@pytest.mark.parametrize(
    "overrides",
    [
        ["batching.mode=stream", "batching.bptt=9", "model.bidirectional=false", "training.accumulate=2"],
        ["batching.carry_state=true", "model.bidirectional=false", "optimizer.name=muon", "averaging.name=ema"],
        ["batching.max_tokens=50", "model.ngram_embeddings=[2, 3]", "training.sampled_tokens=4"],
        ["model.ngram_counts=4"],
    ],
)
def test_the_steps_that_are_measured_are_those_of_training_and_leave_no_trace(small, monkeypatch, overrides):
    """By a clock that stands a second further at each look, so that a step takes a second."""
    figures, take_step = [], TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *given: figures.append(take_step(*given)) or figures[-1])
    config = small(*overrides, "training.num_threads=2", "training.max_epochs=9")
    corpora = prepare(config, lambda line: None)
    batches = configuration.training_batches(config, corpora.train, corpora.tokenizer.eos_id)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(cost, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        measured = measure_cost(config, corpora.tokenizer, corpora.train, batches)
    assert torch.rand(3).equal(wanted)
    assert torch.get_num_threads() == 1
    assert not Path("runs").exists()
    of_measuring, figures[:] = list(figures), []
    train(config, stop_at_step=len(of_measuring))
    torch.set_num_threads(1)
    assert [each.events for each in of_measuring] == [each.events for each in figures]
    assert (of_measuring[0].nats, of_measuring[0].gradient_norm) == (figures[0].nats, figures[0].gradient_norm)
    assert of_measuring[-1].nats != figures[0].nats
    assert measured.steps == len(figures) - 1 == cost.LEAST_STEPS  # the first one is not counted
    assert measured.tokens_per_second == sum(each.events["forward"] for each in figures[1:]) / measured.steps


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_text_too_large_to_count_is_refused_as_train_does(large, monkeypatch, size):
    if size == "large":
        (large / "train.txt").write_text("\n".join(lines(9000)))
    monkeypatch.setattr(ngram_counts, "LARGEST_TOKENS", 300 if size == "small" else 120_000)
    config = load_config("config.yaml", ["model.ngram_counts=3"])
    message, about = r"[\d,]+ tokens are too many to count in memory", "about 1[45]" if size == "large" else "3"
    with pytest.raises(ConfigError, match=rf"^model\.ngram_counts: {about}{message}"):
        next(describe_configuration(config, print))
    with pytest.raises(ConfigError, match=rf"^model\.ngram_counts: {message}"):
        train(config, "run")


@pytest.mark.parametrize("scale", [1, 1000])
def test_counting_is_in_the_figures(small, scale):
    """The peak is that of training with all tables, or that of counting if it takes more."""
    counting = Counting(tokens=1000, took_s=0.5, kept_bytes=80_000)
    measured = Measured(50.0, 7, 3_000_000, torch.device("cpu"), "fp32", start_bytes=1_000_000, counting=counting)
    config, tokens = small("model.ngram_counts=4"), 1000 * scale
    assert measured.count_s(tokens) == 0.5 * scale
    assert measured.peak_bytes(tokens) == {1: 3_000_000, 1000: 1_000_000 + COUNTING_BYTES * tokens}[scale]
    said = "\n".join(report(config))
    assert re.search(r"^counting n-grams: about [\d.]+ s, once, with about \d[\d,.]* MB$", said, re.MULTILINE)


PEAKS = """
from lmtrain.check.configuration import count_weights, training_batches
from lmtrain.check.cost import measure_cost
from lmtrain.config import load_config
from lmtrain.data.preparation import prepare
for size in (8, 8, 512):
    config = load_config("config.yaml", [f"model.hidden_size={size}", "model.output=full"])
    corpora = prepare(config, lambda line: None)
    batches = training_batches(config, corpora.train, corpora.tokenizer.eos_id)
    measured = measure_cost(config, corpora.tokenizer, corpora.train, batches)
    print(count_weights(config, corpora.tokenizer.vocab_size), measured.memory_bytes)
"""


def test_the_peak_of_memory_holds_weights_gradients_and_moments(corpus):
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    _, (small_weights, small_bytes), (weights, peak_bytes) = [
        map(int, line.split()) for line in done.stdout.splitlines()
    ]
    assert 16 * weights > 50e6
    assert 16 * (weights - small_weights) < peak_bytes - small_bytes < 40 * weights


@pytest.mark.parametrize(
    ("overrides", "wanted_s"),
    [
        ([], (20, 40)),
        (["training.max_steps=10"], (20, 2)),
        (["training.max_steps=10", "training.accumulate=4"], (20, 8)),
        (["training.max_minutes=0.5"], (20, 30)),
    ],
)
def test_the_time_of_training_is_that_of_its_shortest_bound(small, overrides, wanted_s):
    measured = Measured(100.0, 5, 0, torch.device("cpu"), "fp32")
    assert measured.duration_s(small(*overrides), events=2000, batches=100) == pytest.approx(wanted_s)


def test_a_model_that_is_too_large_is_not_built(small, monkeypatch):
    assert why_not_measured(small(), 10_000) is None
    assert "GB are free" in why_not_measured(small(), 10**13)
    monkeypatch.setattr(configuration, "measure_cost", None)  # to call it would raise
    config = small("model.hidden_size=4096")
    assert said(config)["time"].startswith("not measured: with layers of more than 2,048")


def test_durations_in_words():
    assert [describe_duration(each) for each in (0.123, 45, 600, 7300, 400_000)] == [
        "0.12 s",
        "45.0 s",
        "10.0 min",
        "2.0 h",
        "4.6 days",
    ]


def test_a_training_that_diverges_at_once_is_reported_without_a_time(small):
    config = small(
        "optimizer.name=sgd", "optimizer.lr=1e30", "optimizer.clip_grad_norm=null", "schedule.warmup_steps=1"
    )
    assert said(config)["time"].startswith("not measured: the loss of the first steps is not finite")
