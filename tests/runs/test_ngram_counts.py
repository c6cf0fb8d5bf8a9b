"""The file of counted n-grams: written once, checked at each load, and refused in one line if it is damaged."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

import lmtrain
from lmtrain.data.batches.rows import Rows
from lmtrain.data.preparation import prepare
from lmtrain.errors import ArtefactError, ConfigError, DataError
from lmtrain.model.ngrams.counting import context_keys, count_ngrams
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


def test_a_resume_reads_the_file_and_counts_only_if_it_is_missing_or_damaged(trained, small, monkeypatch):
    config, whole, counted = small("training.max_steps=5", "model.ngram_counts=3"), trained.read_bytes(), []
    monkeypatch.setattr(ngram_counts, "count_ngrams", lambda *given: counted.append(1) or count_ngrams(*given))
    train(config, "run", resume=True)
    assert not counted
    for name in ("missing", "cut short"):
        DAMAGES[name][0](trained)
        train(config, "run", resume=True)
        assert trained.read_bytes() == whole
        assert [counted.pop(), counted.pop()] == [1, 1]  # a direction each


def test_a_resume_does_not_ask_how_the_library_lays_out_its_files(trained, small, monkeypatch):
    """A later safetensors may write the same tensors behind another header."""
    save = safetensors.torch.save
    monkeypatch.setattr(safetensors.torch, "save", lambda tensors: save(tensors, {"a later": "layout"}))
    config = small("training.max_steps=6", "model.ngram_counts=3")
    assert train(config, "run", resume=True).step == 6
    trained.unlink()
    with pytest.raises(ArtefactError, match=r"run/ngram_counts\.safetensors: .*put the file back"):
        train(config, "run", resume=True)


def test_what_a_cut_row_finds_was_counted_with_its_own_events(small):
    """Sequences are counted whole, and rows of at most max_length tokens begin without history. A shortened history is
    either not among the counts at all, or it is the one under which the event was counted."""
    config, order = small("batching.max_length=3", "model.bidirectional=false", "model.ngram_counts=4"), 4
    corpora = prepare(config, lambda line: None)
    counts, store = ngram_counts.count_text(config, corpora.train, corpora.tokenizer), corpora.train
    rows, tokens, shortened = Rows(store, 3), store.tokens.astype(int), 0
    begins = [int(store.offsets[store.offsets <= start][-1]) for start in rows.starts]  # of each row's sequence
    assert rows.split_sequences > 9

    def keys(first, event):
        """The keys of the histories of an event, from a token on."""
        history = [0] * (order - 1) + (tokens[first:event] + 1).tolist()
        return [int(key) for key in context_keys(torch.tensor([history[len(history) - order + 1 :]]))]

    for begin, start, length in zip(begins, rows.starts.tolist(), rows.row_lengths.tolist(), strict=True):
        for event in range(start + 1, start + length):
            of_row, of_sequence = keys(start, event), keys(begin, event)
            for number, (found, counted) in enumerate(zip(of_row, of_sequence, strict=True), 1):
                contexts = counts[f"of_forward.{number}.contexts"]
                assert counted in contexts
                assert found == counted or found not in contexts
                shortened += found != counted
    assert shortened > 50


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
        table, before = model.model.mixtures["of_forward"].table, 0
        for number, part in enumerate(table.slices, 2):
            assert table.contexts[part].equal(counts[f"{number}.contexts"])
            end = before + len(counts[f"{number}.pairs"])
            assert (table.pairs[before:end] - part.start * model.tokenizer.vocab_size).equal(counts[f"{number}.pairs"])
            assert table.counts[before:end].equal(counts[f"{number}.counts"])
            before = end
        assert number == 4
        assert before == len(table.pairs)
