"""The file of counted n-grams: written once, checked at each load, and refused in one line if it is damaged."""

import hashlib
import json

import pytest
import torch

import lmtrain
from lmtrain.errors import ConfigError, DataError
from lmtrain.model.ngrams.counts import PARTS, count_ngrams
from lmtrain.runs import checkpoint, ngram_counts
from lmtrain.runs.tensor_file import parse_tensors
from lmtrain.training.start import train
from tests.conftest import NO_FILE

V = 9


@pytest.fixture
def trained(small, tmp_path, monkeypatch):
    """Train a run with counts, and return the path of its file of counts."""
    monkeypatch.chdir(tmp_path)
    train(small("training.max_steps=4", "model.ngram_counts=3", "validation.every_steps=4"), "run")
    return tmp_path / "run" / ngram_counts.COUNTS_FILE


def test_a_run_keeps_its_counts_and_says_so(trained, shell):
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    for state in trained.parent.glob("checkpoints/*/state.json"):
        assert json.loads(state.read_text())["counts"] == digest
    done = shell("check", "run")
    assert done.returncode == 0
    assert f"ngram_counts.safetensors: whole, {trained.stat().st_size:,} bytes" in done.stdout
    model = lmtrain.load("run")
    rows = map(json.loads, (trained.parent / "metrics.jsonl").read_text().splitlines())
    (in_training,) = [row["valid/perplexity"] for row in rows if "valid/perplexity" in row]
    assert model.evaluate().perplexity == pytest.approx(in_training, rel=1e-6)


def test_prompts_of_a_batch_are_continued_as_each_alone(trained):
    model, prompts = lmtrain.load("run"), ["", "a b", "c d e", "h"]
    together = [each.text for each in model.generate(prompts)]
    assert together == [model.generate([prompt])[0].text for prompt in prompts]


def rewrite(path, change):
    """Change the counts, and save checkpoints that ask for the changed file."""
    tensors = parse_tensors(path, path.read_bytes())
    change(tensors)
    path.write_bytes(ngram_counts.dump_counts(tensors))
    checkpoints = path.parent / "checkpoints"
    for step in checkpoint.steps(checkpoints):
        saved = checkpoint.load(checkpoints, step)
        saved.state["counts"] = hashlib.sha256(path.read_bytes()).hexdigest()
        checkpoint.save(checkpoints, saved)


PAIRS, COUNTS, CONTEXTS = (f"of_forward.3.{name}" for name in ("pairs", "counts", "contexts"))
OTHER = "run/ngram_counts.safetensors: not the counts of this model"
WRONG = "run/ngram_counts.safetensors: of_forward.3: not counts of a vocabulary of"


def one(name, index, value):
    """Return a function that changes one number."""
    return lambda path: rewrite(path, lambda tensors: tensors[name].__setitem__(index, value))


def change(make):
    """Return a function that changes the counts of one order."""
    return lambda path: rewrite(path, lambda tensors: tensors.update({COUNTS: make(tensors[COUNTS])}))


DAMAGES = {
    "missing": (lambda path: path.unlink(), f"run/ngram_counts.safetensors: {NO_FILE}"),
    "cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "run/ngram_counts.safetensors: damaged: not",
    ),
    "a part missing": (lambda path: rewrite(path, lambda tensors: tensors.pop(PAIRS)), OTHER),
    "no tensors": (lambda path: rewrite(path, lambda tensors: tensors.clear()), OTHER),
    "a pair beyond its contexts": (one(PAIRS, -1, 1 << 60), WRONG),
    "a pair below zero": (one(PAIRS, 0, -1), WRONG),
    "contexts not ascending": (one(CONTEXTS, 0, 1 << 62), WRONG),
    "a count of nothing": (one(COUNTS, 0, 0), WRONG),
    "floats": (change(lambda counts: counts.double()), WRONG),
    "counts of another length": (change(lambda counts: counts[1:].clone()), WRONG),
    "counts in a table": (change(lambda counts: counts.unsqueeze(1)), WRONG),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_counts_that_can_not_be_used_are_refused_in_a_line(trained, shell, name):
    damage, message = DAMAGES[name]
    damage(trained)
    for command in (["generate", "run"], ["evaluate", "run"], ["check", "run"]):
        done = shell(*command)
        assert done.returncode == 4, command
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_a_resume_counts_again_and_restores_the_file(trained, small):
    whole = trained.read_bytes()
    for name in ("missing", "cut short"):
        DAMAGES[name][0](trained)
        train(small("training.max_steps=5", "model.ngram_counts=3"), "run", resume=True)
        assert trained.read_bytes() == whole


def test_a_text_too_large_to_count_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ngram_counts, "LARGEST_TOKENS", 50)
    with pytest.raises(ConfigError, match=r"model\.ngram_counts: [\d,]+ tokens are too many to count in memory"):
        train(small("model.ngram_counts=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_may_differ_by_more_than_64_bits():
    contexts, pairs, counts = (
        torch.tensor([-(1 << 62) - 5, (1 << 62) + 5]),
        torch.tensor([3, V + 1]),
        torch.ones(2).int(),
    )
    assert ngram_counts._is_searchable(contexts, pairs, counts, V)
    assert not ngram_counts._is_searchable(contexts.flip(0), pairs, counts, V)


def test_a_text_that_has_changed_costs_a_finished_run_nothing(small, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c\nb c d\n" * 9)
    config = small(f"data.train={path}", "data.valid=null", "model.ngram_counts=3", "training.max_steps=3")
    train(config, tmp_path / "run")
    before = lmtrain.load(tmp_path / "run").generate([""])[0].text
    path.write_text("a b c\nd c d\n" * 9)
    with pytest.raises(DataError, match="changed since the run was begun"):
        train(config, tmp_path / "run", resume=True)
    assert lmtrain.load(tmp_path / "run").generate([""])[0].text == before


def test_a_file_that_claims_more_than_could_be_counted_is_not_read(trained, shell, monkeypatch):
    monkeypatch.setattr(ngram_counts, "LARGEST_TOKENS", 5)
    done = shell("generate", "run")
    assert done.returncode == 4
    assert done.stderr.startswith("run/ngram_counts.safetensors: of_forward.1: not counts of a vocabulary")


def test_the_counts_of_a_text_of_one_word_are_read_back(small, tmp_path):
    for number, text in enumerate(["a\n", "a b\n", "b a c\na\n"]):  # keys of few contexts may lie far apart
        (tmp_path / "few.txt").write_text(text)
        settings = ["data.valid=null", f"data.train={tmp_path}/few.txt", "model.ngram_counts=4", "training.max_steps=2"]
        result = train(small(*settings), tmp_path / f"run-{number}")
        model = lmtrain.load(result.run)
        rows = [[1, *model.tokenizer.encode(line), 2] for line in text.splitlines()]
        tokens = torch.tensor([token for row in rows for token in row])
        position = torch.tensor([position for row in rows for position in range(len(row))])
        counts = count_ngrams(tokens, position, 4, model.tokenizer.vocab_size)
        for number, order in enumerate(model.model.ngram_counts["of_forward"].orders, 1):
            for part in PARTS:
                assert getattr(order, part).equal(counts[f"{number}.{part}"])
        assert number == 4
