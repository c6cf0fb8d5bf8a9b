"""The n-gram model that recurrent ones are held against is a true one."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from tests.conftest import load_script, shared

baseline = load_script("ngram_baseline")
BOS, EOS, VOCABULARY = 1, 2, 9


def store(*rows):
    tokens = np.array([token for row in rows for token in row], np.uint16)
    return SimpleNamespace(tokens=tokens, offsets=np.cumsum([0, *map(len, rows)]).astype(np.uint64))


TEXT = store([BOS, 4, 5, EOS], [BOS, 4, 6, EOS], [BOS, 5, 4, 5, 5, EOS], [BOS, 4, 5, EOS], [BOS, 8, 4, 5, 6, 4, EOS])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_gives_each_context_a_whole_distribution(order):
    model = baseline.KneserNey(TEXT, VOCABULARY, order)
    for context in itertools.product([4, 5, 7], repeat=2):
        before = [BOS, *context]
        nats = [model.nats(store([*before, token])).nats - model.nats(store(before)).nats for token in range(2, 9)]
        assert sum(np.exp(-np.array(nats))) == pytest.approx(1.0)


def test_what_was_seen_is_likelier_and_higher_orders_know_more():
    model = baseline.KneserNey(TEXT, VOCABULARY, 3)
    assert model.nats(store([BOS, 4, 5, EOS])).nats < model.nats(store([BOS, 5, 6, 8])).nats
    fits = [baseline.KneserNey(TEXT, VOCABULARY, order).nats(TEXT).perplexity for order in (1, 2, 3)]
    assert fits == sorted(fits, reverse=True)


def test_a_stream_continues_from_line_to_line():
    lines = store([4, 5, EOS], [6, 7, EOS], [4, 5, EOS], [6, 7, EOS], [8, 7, EOS], [4, 8, EOS])
    model = baseline.KneserNey(lines, VOCABULARY, 3, stream=True)
    assert model.nats(lines).tokens == 18
    seen, unseen = (model.nats(store([first, EOS, 6])).nats - model.nats(store([first, EOS])).nats for first in (5, 7))
    assert seen < unseen


@pytest.mark.parametrize("mode", [["batching.mode=sentences"], ["batching.mode=stream", "model.bidirectional=false"]])
def test_it_reads_a_run(small, capsys, mode):
    run = train(small("training.max_steps=2", *mode)).run
    assert baseline.main([str(run), "--order", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("valid: 3-gram Kneser-Ney, ")
    tokens = load(run).evaluate().figures()["tokens"]
    assert f" {tokens:,} tokens" in said


def test_a_longer_context_helps_on_names(tmp_path, monkeypatch, capsys):
    folder = shared("names")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"data: {{train: {json.dumps(str(folder / 'train.txt'))}, valid: {json.dumps(str(folder / 'valid.txt'))}}}\n"
        "tokenizer: {kind: char}\nmodel: {hidden_size: 8, embedding_size: 8, num_layers: 1}\n"
        "training: {max_steps: 1, precision: fp32}\nlogging: {sample_prompts: []}\n"
    )
    run = train("c.yaml").run
    found = []
    for order in ("1", "2", "5"):
        baseline.main([str(run), "--order", order])
        found.append(float(capsys.readouterr().out.split("perplexity ")[1].split(",")[0]))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 10
