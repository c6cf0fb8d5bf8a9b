"""Generation: greedy takes the best token, and a batch of prompts gives what each prompt gives alone."""

import math
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

from lmtrain.config import load_config
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train
from tests.inference.conftest import untrained_model


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
        model = untrained_model(tokenizer, seed, cell=cell)
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
    model = untrained_model(tokenizer)
    prompts = [" ".join(str(1 + (n * k) % 8) for k in range(n % 5)) for n in range(11)]
    results = generate(model, PromptCodec(tokenizer), prompts, max_tokens=5)
    assert [result.prompt for result in results] == prompts
    alone = [generate(model, PromptCodec(tokenizer), [prompt], max_tokens=5)[0].text for prompt in prompts]
    assert [result.text for result in results] == alone


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_text_is_prompt_and_completion(kind):
    texts = ["나는 이불을 뒤집어 쓰고", "the old cat sat"] * 4
    tokenizer = train_tokenizer(kind, texts, vocab_size=300)
    for result in generate(untrained_model(tokenizer), PromptCodec(tokenizer), ["", "the old", "나는"], max_tokens=8):
        assert result.text == result.prompt + result.completion
        assert kind != "word" or not result.prompt or result.completion.startswith(" ")


def test_a_stop_text_in_decomposed_letters_stops_as_the_composed_one_does(tmp_path, monkeypatch):
    """A Mac types Hangul in decomposed letters (NFD); texts, prompts and stop texts are all composed (NFC)."""
    monkeypatch.chdir(tmp_path)
    decomposed = partial(unicodedata.normalize, "NFD")
    Path("t.txt").write_text(decomposed("고양이가 잔다\n" * 40))
    Path("c.yaml").write_text(
        "data: {train: t.txt}\ntokenizer: {kind: char}\nschedule: {warmup_steps: 1}\n"
        "model: {embedding_size: 8, hidden_size: 24, num_layers: 1, dropout: 0.0}\noptimizer: {lr: 0.02}\n"
        "training: {max_epochs: 40, precision: fp32, device: cpu, num_threads: 1}\nlogging: {sample_prompts: []}\n"
    )
    train(load_config("c.yaml"))
    model = load("runs/c")
    for form in (decomposed, partial(unicodedata.normalize, "NFC")):
        assert [each.completion for each in model.generate([form("고양이")], stop=[form("다")])] == ["가 잔"]
        assert "".join(model.stream(form("고양이"), stop=[form("다")])) == "가 잔"
