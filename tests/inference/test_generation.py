"""Generation and evaluation: greedy is greedy, batches change nothing, sums are sums."""

import doctest
import json
import math

import numpy
import pytest
import torch

import lmtrain
from lmtrain.data.store.token_store import Source, open_store
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.trained_model import TrainedModel, load
from lmtrain.model.language_model import LanguageModel
from lmtrain.training.start import train
from tests.conftest import ROOT


def untrained(tokenizer, seed=3, **more):
    torch.manual_seed(seed)
    settings = {"embedding_size": 12, "hidden_size": 16, "num_layers": 2} | more
    model = LanguageModel(tokenizer.vocab_size, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that the best token is no matter of rounding
    return model.eval()


def plain_greedy(model, tokenizer, prompt, max_tokens):
    """One prompt, the whole text read anew for each token: slow, and plainly right."""
    tokens, log_probability = [tokenizer.bos_id, *tokenizer.encode(prompt)], 0.0
    written = []
    for _ in range(max_tokens):
        with torch.no_grad():
            logits, _ = model(torch.tensor(tokens + written).unsqueeze(1))
        log_probabilities = logits[-1, 0].log_softmax(-1)
        log_probabilities[[tokenizer.pad_id, tokenizer.bos_id]] = -math.inf
        token = int(log_probabilities.argmax())
        log_probability += float(log_probabilities[token])
        if token == tokenizer.eos_id:
            return written, True, log_probability
        written.append(token)
    return written, False, log_probability


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("max_tokens", [1, 25])
def test_a_batch_of_ragged_prompts_equals_one_at_a_time(cell, max_tokens):
    tokenizer = IdsTokenizer(9, 0)
    ended = set()
    for seed in range(6):
        model = untrained(tokenizer, seed, cell=cell)
        prompts = ["1 2 3 4 5", "", "7", "3 3 3 3 3 3 3 3", "7 1", "2", "8 8 4"]
        for prompt, result in zip(
            prompts, generate(model, PromptCodec(tokenizer), prompts, max_tokens=max_tokens), strict=True
        ):
            ids, finished, log_probability = plain_greedy(model, tokenizer, prompt, max_tokens)
            assert tokenizer.encode(result.completion) == ids
            assert result.finished == finished
            assert result.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)
            assert result.text == result.prompt + result.completion
            ended.add(finished)
    assert ended == {True, False} or max_tokens == 1


def test_more_prompts_than_fit_a_batch_keep_their_order(monkeypatch):
    monkeypatch.setattr("lmtrain.inference.generation.ROWS_AT_ONCE", 4)
    tokenizer = IdsTokenizer(9, 0)
    model = untrained(tokenizer)
    prompts = [" ".join(str(1 + (n * k) % 8) for k in range(n % 5)) for n in range(11)]
    results = generate(model, PromptCodec(tokenizer), prompts, max_tokens=5)
    assert [result.prompt for result in results] == prompts
    alone = [generate(model, PromptCodec(tokenizer), [prompt], max_tokens=5)[0].text for prompt in prompts]
    assert [result.text for result in results] == alone


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_text_is_prompt_and_completion(kind):
    texts = ["나는 이불을 뒤집어 쓰고", "the old cat sat"] * 4
    tokenizer = train_tokenizer(kind, texts, vocab_size=300)
    for result in generate(untrained(tokenizer), PromptCodec(tokenizer), ["", "the old", "나는"], max_tokens=8):
        assert result.text == result.prompt + result.completion
        assert kind != "word" or not result.prompt or result.completion.startswith(" ")


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


def test_a_run_works_without_its_corpus(small, corpus, tmp_path):
    run = train(small("training.max_steps=3")).run
    before = load(run).generate(["a b", ""])
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    (corpus / "train.txt").unlink()
    (corpus / "valid.txt").rename(corpus / "kept.txt")
    model = load(moved)
    assert model.generate(["a b", ""]) == before
    assert model.evaluate(["kept.txt"]).perplexity > 1
    with pytest.raises(DataError, match="the run's own file"):
        model.evaluate()


def test_a_held_out_share_is_what_evaluation_reads(small):
    run = train(small("data.valid=null", "data.valid_fraction=0.3", "training.max_steps=2")).run
    model = load(run)
    source = Source(("train.txt",), part="valid", valid_fraction=0.3)
    held_out = open_store(source, model.tokenizer, "cache").counts
    assert 0 < held_out.sequences < 43
    assert model.evaluate().figures()["tokens"] == held_out.tokens - held_out.sequences


def test_no_run_to_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no trained run under runs/"):
        load()


def test_the_newest_run_is_taken(small):
    train(small("training.max_steps=1"))
    second = train(small("training.max_steps=1", "name=second")).run
    assert load().run == second


def test_sample_ids_are_learnt_by_heart(tmp_path, monkeypatch):
    from lmtrain.config import load_config

    monkeypatch.chdir(ROOT)
    overrides = [f"runs_dir={tmp_path}", f"data.cache_dir={tmp_path}", "training.num_threads=1"]
    model = load(train(load_config("configs/sample_ids.yaml", overrides)).run)
    sequences = (ROOT / "data" / "sample_ids.txt").read_text().splitlines()
    results = model.generate([line.split()[0] for line in sequences])
    assert [result.text for result in results] == sequences
    assert all(result.finished for result in results)


def test_samples_are_written_at_each_validation(small):
    run = train(small("logging.sample_prompts=['', 'a b']")).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [row["samples"] for row in rows if "samples" in row]
    assert len(samples) == 2
    assert [sample["prompt"] for sample in samples[-1]] == ["", "a b"]
    assert samples[-1][1]["text"] == load(run).generate(["a b"])[0].text


def test_what_the_docstrings_say(small):
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
