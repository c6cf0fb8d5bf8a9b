"""Cache and dynamic evaluation: true probabilities, the plain number beside them, the model left as it was."""

import numpy as np
import pytest
import torch

from lmtrain.data.batches.streams import Stream
from lmtrain.errors import ConfigError
from lmtrain.inference.adaptation import Cache, Dynamic, cache_probability, evaluate_dynamically, evaluate_with_cache
from lmtrain.inference.scoring import evaluate
from lmtrain.inference.trained_model import load
from lmtrain.model.language_model import LanguageModel
from lmtrain.training.start import train

EOS = 2


def model_of():
    torch.manual_seed(3)
    return LanguageModel(9, embedding_size=5, hidden_size=6).eval()


def batches(text, steps):
    stream = Stream(np.array(text), EOS, 1)
    return [stream.batch(span, 0) for span in stream.spans(np.arange(steps, stream.steps, steps))]


def test_a_cache_spreads_all_of_its_weight_over_the_tokens_it_holds():
    torch.manual_seed(1)
    keys, values = torch.randn(30, 4), torch.randint(0, 5, (30,))
    cache = Cache(size=7, theta=0.8)
    each = torch.stack([cache_probability(keys, values, 10, torch.full((20,), w), cache) for w in range(5)])
    torch.testing.assert_close(each.sum(0), torch.ones(20, dtype=torch.float64))
    for n in range(20):  # by hand: the seven events before, and never the one that is asked for
        now = 10 + n
        shares = torch.softmax(0.8 * (keys[now - 7 : now] @ keys[now]), 0)
        wanted = shares[values[now - 7 : now] == 3].sum().double()
        torch.testing.assert_close(each[3, n], wanted, rtol=1e-5, atol=1e-6)


def test_an_empty_cache_says_nothing():
    keys, values = torch.randn(1, 4), torch.zeros(1, dtype=torch.int64)
    assert float(cache_probability(keys, values, 0, values, Cache(5))) == 0.0
    model, text = model_of(), [5]
    assert evaluate_with_cache(model, batches(text, 1), Cache(5, share=0.9)).nats == pytest.approx(
        evaluate(model, batches(text, 1), columns=1).tallies["forward"].nats
    )


@pytest.mark.parametrize("steps", [3, 40, 1000])
def test_cache_figures_do_not_depend_on_the_cuts(steps):
    model, text = model_of(), np.random.default_rng(2).integers(3, 9, 700).tolist()
    whole = evaluate_with_cache(model, batches(text, 700), Cache(50))
    cut = evaluate_with_cache(model, batches(text, steps), Cache(50))
    assert cut.tokens == 700
    assert cut.nats == pytest.approx(whole.nats, rel=1e-6)


def test_a_cache_knows_a_text_that_repeats_itself():
    model, text = model_of(), [3, 7, 4, 8, 5] * 40
    plain = evaluate(model, batches(text, 50), columns=1).tallies["forward"].perplexity
    assert evaluate_with_cache(model, batches(text, 50), Cache(20, theta=200.0, share=0.5)).perplexity < 0.75 * plain


def test_dynamic_evaluation_learns_from_what_it_has_scored_and_leaves_the_model_alone():
    model, text = model_of(), [3, 7, 4, 8, 5] * 40
    before = [parameter.detach().clone() for parameter in model.parameters()]
    plain = evaluate(model, batches(text, 10), columns=1).tallies["forward"]
    still = evaluate_dynamically(model, batches(text, 10), Dynamic(lr=0.0))
    assert still.nats == pytest.approx(plain.nats, rel=1e-6)
    assert evaluate_dynamically(model, batches(text, 10), Dynamic(lr=1.0)).perplexity < 0.7 * plain.perplexity
    held = evaluate_dynamically(model, batches(text, 10), Dynamic(lr=1.0, decay=1.0))
    assert held.nats == pytest.approx(plain.nats, rel=1e-5)  # all that is learnt is taken back
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_chunk_is_scored_before_anything_is_learnt():
    model, text = model_of(), [3, 7, 4, 8, 5]
    plain = evaluate(model, batches(text, 5), columns=1).tallies["forward"]
    assert evaluate_dynamically(model, batches(text, 5), Dynamic(lr=5.0)).nats == pytest.approx(plain.nats, rel=1e-6)


def test_cache_and_dynamic_perplexity_are_reported_beside_the_plain_one(small, tmp_path):
    config = small("batching.mode=stream", "model.bidirectional=false")
    model = load(train(config, tmp_path / "run").run)
    plain = model.evaluate().figures()
    adapted = model.evaluate(cache=Cache(10), dynamic=Dynamic(0.1, steps=7)).figures()
    assert {name: adapted[name] for name in plain} == plain
    assert adapted.keys() - plain.keys() == {"cache_perplexity", "dynamic_perplexity"}


def test_cache_and_dynamic_evaluation_are_refused_without_a_carried_state(small, tmp_path):
    model = load(train(small("training.max_steps=2"), tmp_path / "run").run)
    with pytest.raises(ConfigError, match="need a state that is carried"):
        model.evaluate(cache=Cache(10))
