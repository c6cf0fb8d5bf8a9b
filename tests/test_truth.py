"""The quickstart against the lesson's truth, and the naive network that peeks. Slow: minutes."""

import json

import pytest
import torch

from lmtrain.config import load_config
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from tests.conftest import ROOT, load_script, shared

pytestmark = pytest.mark.slow
TRUTH = json.loads((ROOT / "data/lesson/truth.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def both_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def naive():
    """scripts/naive_network.py as a module."""
    return load_script("naive_network")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("quickstart")
        overrides = [f"runs_dir={folder}", f"data.cache_dir={folder}"]
        yield load(train(load_config("configs/quickstart.yaml", overrides)).run)


def test_both_directions_come_close_to_the_truth_and_never_below_it(quickstart):
    figures, truth = quickstart.evaluate().figures(), TRUTH["test"]
    for name in ("perplexity", "backward_perplexity"):
        assert 0.995 < figures[name] / truth["perplexity"] < 1.05, name
    assert figures["fill_accuracy"] > 1.2 * truth["forward_fill_accuracy"]  # the exact one: no forward model beats it
    assert figures["fill_accuracy"] > 0.95 * truth["fill_accuracy"]
    assert figures["unknown_tokens"] == 0


def test_what_it_writes_is_in_the_grammar(quickstart, naive):
    results = quickstart.generate(naive.random_prompts(200))
    assert all(result.finished for result in results)
    assert naive.share_grammatical([result.text for result in results]) >= 0.9


def test_the_naive_network_peeks_and_writes_nonsense(naive):
    lines = (ROOT / "data/lesson/train.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = naive.train_tokenizer("word", lines, vocab_size=30000, min_frequency=2)
    framed = [[tokenizer.bos_id, *tokenizer.encode(line), tokenizer.eos_id] for line in lines]
    model, perplexity = naive.train_naive(framed, tokenizer.vocab_size, epochs=1)
    assert perplexity < 0.9 * TRUTH["train"]["perplexity"]
    prompts = naive.random_prompts(60)
    assert naive.share_grammatical([naive.write(model, tokenizer, prompt) for prompt in prompts]) < 0.1


def test_korean_reviews_train_from_the_character_template(tmp_path, monkeypatch):
    folder = shared("korean_reviews")
    monkeypatch.chdir(tmp_path)
    data = [f"data.train={folder}/train.txt", f"data.valid={folder}/valid.txt", "data.valid_fraction=null"]
    overrides = [*data, "training.max_steps=300", "model.hidden_size=128", "logging.sample_prompts=['이 영화']"]
    model = load(train(load_config(ROOT / "configs/characters.yaml", overrides)).run)
    (written,) = model.generate(["이 영화"], max_tokens=40)
    assert any("가" <= character <= "힣" for character in written.completion)
    figures = [model.evaluate([str(folder / "test.txt")], size).figures()["nats_per_token"] for size in (1000, 37)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_log_keys_train_from_the_ids_template(tmp_path, monkeypatch):
    folder = shared("hdfs_sessions")
    monkeypatch.chdir(tmp_path)
    data = [f"data.train={folder}/train.txt", f"data.valid={folder}/valid.txt", "tokenizer.vocab_size=30"]
    model = load(train(load_config(ROOT / "configs/ids.yaml", [*data, "training.max_epochs=3"])).run)
    assert model.evaluate().perplexity < 1.5  # of 28 ids: sessions are regular
