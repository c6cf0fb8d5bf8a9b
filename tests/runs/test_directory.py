"""Run directories: which one a new run gets, and which one a resume finds."""

import os
import shutil
from pathlib import Path

import pytest

from lmtrain.errors import ArtefactError, ConfigError
from lmtrain.runs.directory import RunDirectory
from lmtrain.training.start import train
from tests.notes import Notes


def test_a_taken_name_gets_a_suffix_and_a_full_directory_is_refused(small, tmp_path):
    config = small("training.max_steps=1", "checkpoint.every_steps=null")
    runs = [train(config).run.name for _ in range(3)]
    assert runs == ["config", "config-2", "config-3"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; nothing is overwritten"):
        train(config, full)
    with pytest.raises(ConfigError, match="continue the run with --resume"):
        train(config, tmp_path / "runs" / "config")
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_resume_takes_the_last_run_of_the_name_and_starts_afresh_where_there_is_none(small):
    config, progress = small("training.max_steps=2"), Notes()
    first = train(config, resume=True, progress=progress)
    assert "nothing to resume yet: starting afresh" in progress.notes
    assert train(config).run.name == "config-2"
    assert train(small("training.max_steps=4"), resume=True).run.name == "config-2"
    again = train(config, first.run, resume=True, progress=progress)
    assert again.step == 2
    assert "nothing to do" in progress.notes[-1]


def test_resume_takes_the_highest_number_whatever_the_gaps(small, tmp_path):
    config = small("training.max_steps=1", "checkpoint.every_steps=null")
    for _ in range(3):
        train(config)
    shutil.rmtree("runs/config-2")
    assert train(config, resume=True).run.name == "config-3"
    assert train(config).run.name == "config-4"


def test_the_run_s_config_says_how_it_was_last_trained(small, tmp_path):
    train(small("training.max_steps=2"), tmp_path / "run")
    train(small("training.max_steps=4", "generation.max_tokens=3"), tmp_path / "run", resume=True)
    config, _ = RunDirectory(tmp_path / "run").config_and_tokenizer()
    assert (config.training.max_steps, config.generation.max_tokens) == (4, 3)


def test_a_file_that_vanishes_while_a_run_is_looked_through_is_no_fault(small, tmp_path, monkeypatch):
    """A model is used while its training goes on, which renames and removes files."""
    run = RunDirectory(train(small("training.max_steps=2"), tmp_path / "run").run)
    walk = os.walk

    def slow_walk(path):
        for folder, names, files in walk(path):
            passing = Path(folder, ".last.json.7.new")
            passing.unlink(missing_ok=True)
            yield folder, names, [*files, passing.name]

    monkeypatch.setattr(os, "walk", slow_walk)
    run.refuse_links()
    (run.path / "link").symlink_to("config.yaml")
    with pytest.raises(ArtefactError, match="link: not a regular file"):
        run.refuse_links()
