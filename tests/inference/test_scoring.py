"""Scores of lines and evaluation: sums that agree with each other and do not depend on what stands beside a line."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmtrain.config import load_config
from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference import scoring
from lmtrain.inference.options import Sampling
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(9, 0)
LINES = ["1 2 3", "", "4", "5 6 7 8 1 2 3 4 5 6 7 8", "8", "2 2 2 2 2", ""]


def scored(model, lines, **settings):
    return list(scoring.score(model, PromptCodec(IDS), [Block("lines", range(1, 1 + len(lines)), lines)], **settings))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_line_costs_what_its_tokens_cost_each_read_by_itself(direction):
    model = untrained_model(IDS, 1, bidirectional=True)
    for line, found in zip(LINES, scored(model, LINES, direction=direction, each=True), strict=True):
        ids = IDS.encode(line)
        row = [IDS.bos_id, *ids, IDS.eos_id] if direction == "forward" else [IDS.eos_id, *ids[::-1], IDS.bos_id]
        with torch.no_grad():
            logits, _ = model(torch.tensor(row[:-1]).unsqueeze(1), None, direction)
        own = logits.squeeze(1).log_softmax(-1).gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1).tolist()
        names = [str(token) for token in ids]
        if direction == "backward":
            own = own[::-1]  # in the order of the text
            assert [name for name, _ in found.each] == ["<bos>", *names]
        else:
            assert [name for name, _ in found.each] == [*names, "<eos>"]
        assert [value for _, value in found.each] == pytest.approx(own, rel=1e-4, abs=1e-5)
        assert found.log_probability == pytest.approx(sum(own), rel=1e-4)
        assert found.tokens == len(ids) + 1


def test_direction_both_is_the_mean_of_forward_and_backward():
    model = untrained_model(IDS, 2, bidirectional=True)
    one, other, both = (scored(model, LINES, direction=name) for name in ("forward", "backward", "both"))
    for left, right, mean in zip(one, other, both, strict=True):
        assert mean.log_probability == pytest.approx((left.log_probability + right.log_probability) / 2, rel=1e-5)


def test_numbers_depend_neither_on_the_batch_nor_on_the_block(monkeypatch):
    model = untrained_model(IDS, 3)
    wanted = [each.log_probability for each in scored(model, LINES)]
    for size in (1, 7, 30):
        monkeypatch.setattr("lmtrain.inference.scoring.SCORED_TOKENS", size)
        assert [each.log_probability for each in scored(model, LINES)] == pytest.approx(wanted, rel=1e-5)
    blocks = [Block("lines", range(1, 3), LINES[:2]), Block("lines", range(3, 1 + len(LINES)), LINES[2:])]
    again = list(scoring.score(model, PromptCodec(IDS), blocks))
    assert [each.line for each in again] == list(range(1, 8))
    assert [each.log_probability for each in again] == pytest.approx(wanted, rel=1e-5)


def test_lines_sum_up_to_what_evaluate_says_cut_lines_too(corpus, small):
    model = load(train(small("training.max_steps=3", "batching.max_length=4")).run)
    figures = model.evaluate(["valid.txt"]).figures()
    lines = (corpus / "valid.txt").read_text().splitlines()
    for direction, name in (("forward", "perplexity"), ("backward", "backward_perplexity")):
        found = list(model.score(lines, direction))
        nats, tokens = -sum(each.log_probability for each in found), sum(each.tokens for each in found)
        assert tokens == figures["tokens"]
        assert 2.718281828459045 ** (nats / tokens) == pytest.approx(figures[name], rel=1e-5)
    assert sum(each.unknown_tokens for each in model.score(["a zzz", "qqq qqq"])) == 3
    with pytest.raises(ConfigError, match="direction both: a token's"):
        model.score(lines, "both", each=True)


def test_a_file_of_one_text_needs_no_separator(corpus, small):
    for name in ("train.txt", "valid.txt"):
        path = corpus / name
        path.write_text(path.read_text().replace("\n", "\n%%\n"))
    model = load(train(small("training.max_steps=2", "data.separator=%%")).run)
    (corpus / "one.txt").write_text("the cat\nsat\n")
    assert model.evaluate(["one.txt"]).figures()["tokens"] == len(model.tokenizer.encode("the cat\nsat")) + 1


def test_a_fault_has_its_place_and_comes_when_its_block_is_read():
    found = scoring.score(
        untrained_model(IDS), PromptCodec(IDS), [Block("f", [1], ["1"]), Block("f", [2, 3], ["2", "3 x"])]
    )
    assert next(found).line == 1
    with pytest.raises(DataError, match=r"f:3:3: 'x' is not an id"):
        next(found)


def test_a_run_of_one_direction_has_no_backward(small):
    model = load(train(small("training.max_steps=3", "model.bidirectional=false")).run)
    for call in (
        lambda: model.score(["a"], "backward"),
        lambda: model.score(["a"], "both"),
        lambda: model.generate(["a"], backward=True),
    ):
        with pytest.raises(ConfigError, match="reads in one direction; backward takes two"):
            call()


def test_texts_are_taken_a_few_at_a_time(small, monkeypatch):
    model = load(train(small("training.max_steps=3")).run)
    monkeypatch.setattr("lmtrain.inference.trained_model.LINES_AT_ONCE", 2)
    taken = []

    def texts():
        for number in range(7):
            taken.append(number)
            yield "a b"

    found = model.score(texts())
    next(found)
    assert len(taken) == 2
    assert [each.line for each in found] == [2, 3, 4, 5, 6, 7]


def test_evaluation_without_ends_and_unknown_words_and_its_worst_lines(corpus, small):
    model = load(train(small("training.max_steps=3")).run)
    (corpus / "odd.txt").write_text("a b\nzzz\n\nc a qqq d\nb b b b b b\n")
    figures = model.evaluate(["odd.txt"]).figures()
    found = list(model.score((corpus / "odd.txt").read_text().splitlines(), each=True))
    each = [token for number in (0, 1, 3, 4) for token in found[number].each]  # blank lines are no sequences
    for name, left_out in (("end", "<eos>"), ("unknown", "<unk>")):
        kept = [value for text, value in each if text != left_out]
        assert len(kept) < len(each)
        wanted = 2.718281828459045 ** (-sum(kept) / len(kept))
        assert figures[f"perplexity_without_{name}_tokens"] == pytest.approx(wanted, rel=1e-4)
    worst = model.worst_lines(["odd.txt"], 3)
    ranked = sorted((0, 1, 3, 4), key=lambda number: found[number].log_probability / found[number].tokens)
    assert [place for place, _, _ in worst] == [f"odd.txt:{number + 1}" for number in ranked[:3]]
    assert worst[0][2] == (corpus / "odd.txt").read_text().splitlines()[ranked[0]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_text(corpus, small):
    """Peak memory of scoring 1 kB, 2 MB and 8 MB."""
    run = train(small("training.max_steps=3", "model.bidirectional=false")).run
    text = (corpus / "train.txt").read_text()
    code = """
import sys
from lmtrain.cli import _run
sys.argv = ["lmtrain", "score", *sys.argv[1:]]
_run()
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
    peaks = []
    for size in (10**3, 2 * 10**6, 8 * 10**6):
        (corpus / "long.txt").write_text(text * (size // len(text) + 1))
        command = [sys.executable, "-c", code, str(run), "long.txt"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    print(f"peak MiB: {peaks}")
    assert peaks[2] - peaks[1] < 30
    assert peaks[2] - peaks[0] < 500


@pytest.mark.parametrize("bidirectional", [True, False])
def test_evaluation_does_not_depend_on_the_batch(corpus, small, bidirectional):
    run = train(
        small(f"model.bidirectional={bidirectional}".lower(), "training.max_steps=3", "batching.max_length=4")
    ).run
    model = load(run, "cpu")
    wanted = model.evaluate(["train.txt"]).figures()
    assert wanted["tokens"] == sum(len(line.split()) + 1 for line in (corpus / "train.txt").read_text().splitlines())
    for batch_size in (1, 2, 7, 1000):
        for name, value in model.evaluate(["train.txt"], batch_size).figures().items():
            assert value == (wanted[name] and pytest.approx(wanted[name], rel=1e-5)), name
    assert (wanted["backward_perplexity"] is None) == (not bidirectional)


def test_figures_are_summed_and_divided_once(corpus, small):
    model = load(train(small("training.max_steps=3")).run)
    figures = model.evaluate(["valid.txt"]).figures()
    lines = (corpus / "valid.txt").read_text()
    total = figures["nats_per_token"] * figures["tokens"]
    with torch.no_grad():
        alone = 0.0
        for line in lines.splitlines():
            ids = [1, *model.tokenizer.encode(line), 2]
            log_probabilities = model.model(torch.tensor(ids[:-1]).unsqueeze(1))[0].squeeze(1).log_softmax(-1)
            alone -= float(log_probabilities.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum())
    assert total == pytest.approx(alone, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(alone / figures["tokens"]), rel=1e-5)
    assert figures["bits_per_character"] == pytest.approx(alone / math.log(2) / len(lines), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(alone / math.log(2) / len(lines.encode()), rel=1e-5)


def test_validation_in_training_is_evaluation_afterwards(small):
    result = train(small())
    figures = load(result.run).evaluate().figures()  # no test set: the validation set
    assert figures["perplexity"] == pytest.approx(result.figures["valid/perplexity"], rel=1e-6)
    assert figures["backward_perplexity"] == pytest.approx(result.figures["valid/backward_perplexity"], rel=1e-6)
    assert figures["fill_accuracy"] == result.figures["valid/fill_accuracy"]


def test_ids_are_no_text_with_bits_per_character(corpus, small, shell):
    for name in ("train.txt", "valid.txt"):
        text = (corpus / name).read_text()
        (corpus / name).write_text("".join(str(1 + "abcdefgh".find(each)) if each > " " else each for each in text))
    ids = ("tokenizer.kind=ids", "tokenizer.vocab_size=9", "tokenizer.pad_id=0", "logging.sample_prompts=['']")
    run = train(small("training.max_steps=3", *ids)).run
    figures = json.loads(shell("evaluate", run, "--json").stdout)
    for name in ("bits_per_character", "bits_per_byte", "backward_bits_per_character"):
        assert figures[name] is None
    assert figures["perplexity"] > 1
    assert "bits per" not in shell("evaluate", run).stdout


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_empty_sequence_is_learnt_scored_drawn_and_counted(tmp_path, monkeypatch, cell):
    """Two in five strings of an automaton are empty; both directions learn that, and drawn strings show it."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(3)
    strings = ["" if draw.random() < 0.4 else "".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(3000)]
    Path("t.txt").write_text("".join(f"{string}\n" for string in strings))
    Path("c.yaml").write_text(
        "data: {train: t.txt, valid: t.txt, empty: keep}\n"
        "tokenizer: {kind: char, min_frequency: 1}\n"
        "batching: {batch_size: 64, bucket_batches: 1}\n"
        f"model: {{cell: {cell}, embedding_size: 16, hidden_size: 32, num_layers: 1, dropout: 0.0, "
        "bidirectional: true}\n"
        "optimizer: {lr: 0.01}\n"
        "training: {max_epochs: 5, precision: fp32, device: cpu, num_threads: 1}\n"
        "schedule: {warmup_steps: 10}\n"
    )
    train(load_config("c.yaml"))
    model = load("runs/c")
    share = strings.count("") / len(strings)
    for direction in ("forward", "backward"):
        (score,) = model.score([""], direction)
        assert math.exp(score.log_probability) == pytest.approx(share, abs=0.06)
        assert score.tokens == 1
    drawn = list(model.generate(count=400, sampling=Sampling(temperature=1.0, seed=1)))
    assert sum(each.completion == "" for each in drawn) / 400 == pytest.approx(share, abs=0.1)
    counts = model.evaluate(["t.txt"]).counts
    assert (counts.sequences, counts.blank) == (3000, 0)
