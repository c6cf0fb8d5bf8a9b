"""`lmtrain.load`: which run is taken, and what a trained run can do without its corpus."""

import doctest
import os
import tempfile

import numpy
import pytest

import lmtrain
from lmtrain.config import load_config
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.source import Source
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference.trained_model import TrainedModel, load
from lmtrain.training.start import train
from tests.conftest import ROOT


def test_a_run_works_without_its_corpus(small, corpus, tmp_path):
    run = train(small("training.max_steps=3")).run
    before, figures = load(run).generate(["a b", ""]), load(run).evaluate().figures()
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    (corpus / "train.txt").unlink()
    (corpus / "valid.txt").rename(corpus / "kept.txt")
    model = load(moved)
    assert model.generate(["a b", ""]) == before
    assert model.evaluate(["kept.txt"]).figures() == figures
    with pytest.raises(DataError, match="the run's own file, sought from this directory"):
        model.evaluate()


def test_evaluation_needs_no_system_directory_for_temporary_files_and_leaves_nothing(small, corpus, monkeypatch):
    """That is often a directory in memory, where the token store of a large text does not fit."""
    model = load(train(small("training.max_steps=3")).run)
    figures = model.evaluate().figures()
    monkeypatch.setattr(tempfile, "tempdir", str(corpus / "none"))
    monkeypatch.delenv("TMPDIR", raising=False)
    before = sorted(corpus.rglob("*"))
    assert model.evaluate().figures() == figures
    assert sorted(corpus.rglob("*")) == before
    if os.access("/var/tmp", os.W_OK):
        (corpus / "cache").rename(corpus / "elsewhere")  # as if the run had been copied to another machine
        assert model.evaluate().figures() == figures
        assert not (corpus / "cache").exists()


def test_evaluation_reads_the_held_out_fraction(small):
    run = train(small("data.valid=null", "data.valid_fraction=0.3", "training.max_steps=2")).run
    model = load(run)
    source = Source(("train.txt",), part="valid", valid_fraction=0.3)
    held_out = open_store(source, model.tokenizer, "cache").counts
    assert 0 < held_out.sequences < 43
    assert model.evaluate().figures()["tokens"] == held_out.tokens - held_out.sequences


def test_load_is_refused_where_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no trained run under runs/"):
        load()


def test_the_newest_run_is_taken(small):
    train(small("training.max_steps=1"))
    second = train(small("training.max_steps=1", "name=second")).run
    assert load().run == second


def test_examples_in_docstrings_are_true(small):
    """The examples of `TrainedModel`, on a run of two directions."""
    model = load(train(small("training.max_steps=3")).run)
    globs = {"model": model, "lmtrain": lmtrain, "numpy": numpy}
    found = doctest.DocTestFinder(recurse=False)
    tried = 0
    for name, method in vars(TrainedModel).items():
        for example in found.find(method, name, globs=dict(globs)):
            outcome = doctest.DocTestRunner().run(example)
            assert outcome.failed == 0
            tried += outcome.attempted
    assert tried >= 12


def test_the_sample_ids_template_memorises_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [f"runs_dir={tmp_path}", f"data.cache_dir={tmp_path}", "training.num_threads=1"]
    model = load(train(load_config("configs/sample_ids.yaml", overrides)).run)
    sequences = (ROOT / "data" / "sample_ids.txt").read_text().splitlines()
    results = model.generate([line.split()[0] for line in sequences])
    assert [result.text for result in results] == sequences
    assert all(result.finished for result in results)
