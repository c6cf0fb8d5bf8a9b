"""Counted n-grams give the probabilities of counting by hand, exclude the event itself in training, and stay whole."""

import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.counts import CountedNgrams, count_ngrams

BOS, EOS, V = 1, 2, 9


def text(seed=1, rows=30):
    drawn = random.Random(seed)
    return [
        [BOS, *drawn.choices(range(3, V), weights=(9, 5, 3, 2, 1, 1), k=drawn.randint(0, 9)), EOS] for _ in range(rows)
    ]


def counts_of(rows, order=4, backward=False):
    rows = [row[::-1] if backward else row for row in rows]
    tokens, place = (
        torch.tensor([token for row in rows for token in row]),
        torch.tensor([p for row in rows for p in range(len(row))]),
    )
    return count_ngrams(tokens, place, order, V)


def mixture(rows, order=4):
    torch.manual_seed(1)
    ngrams = CountedNgrams(order, V, 5)
    torch.nn.init.normal_(ngrams.shares.weight)
    ngrams.load_counts(counts_of(rows, order))
    return ngrams


def events(rows, order):
    """(histories, targets) of every event, the last tokens last, ids + 1, 0 where there was nothing."""
    found = [
        (([0] * order + [token + 1 for token in row[:at]])[-(order - 1) :], row[at])
        for row in rows
        for at in range(1, len(row))
    ]
    return torch.tensor([history for history, _ in found]), torch.tensor([target for _, target in found])


def by_hand(rows, history, target, order, discounts):
    """The estimates of each order from 2 up, by counting in a dictionary."""
    p, found = 1 / V, []
    for n in range(1, order + 1):
        seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows:
            padded = [0] * order + [token + 1 for token in row]
            for at in range(1, len(row)):
                seen[tuple(padded[order + at - n + 1 : order + at])][row[at]] += 1
        here = seen.get(tuple(history[len(history) - n + 1 :]) if n > 1 else (), Counter())
        total = sum(here.values())
        if total:
            d = discounts[n - 1]
            p = max(here[target] - d, 0) / total + d * len(here) / total * p
        found.append(p)
    return found[1:]


def test_estimates_are_those_of_counting_by_hand():
    rows, order = text(), 4
    ngrams = mixture(rows, order)
    discounts = [each.discount for each in ngrams.orders]
    histories, targets = events(text(seed=2), order)
    found = ngrams.mix(torch.zeros(len(targets), 5), histories, targets).log_estimates.exp()
    for at in range(0, len(targets), 5):
        wanted = by_hand(rows, histories[at].tolist(), int(targets[at]), order, discounts)
        assert found[at].tolist() == pytest.approx(wanted, rel=1e-5)


def test_in_training_an_event_is_left_out_of_the_counts_that_predict_it():
    rows, order = text(rows=8), 3
    ngrams = mixture(rows, order)
    discounts = [each.discount for each in ngrams.orders]
    for number, row in enumerate(rows):
        histories, targets = events([row], order)
        found = ngrams.mix(torch.zeros(len(targets), 5), histories, targets, exclude_event=True).log_estimates.exp()
        for at in range(len(targets)):
            # the row without what comes at this event: its other events are put back one by one
            others = rows[:number] + rows[number + 1 :]
            wanted = by_hand_without(others, row, at + 1, order, discounts)
            assert found[at].tolist() == pytest.approx(wanted, rel=1e-5)


def by_hand_without(others, row, place, order, discounts):
    p, found = 1 / V, []
    for n in range(1, order + 1):
        seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for each in [*others, row]:
            padded = [0] * order + [token + 1 for token in each]
            for at in range(1, len(each)):
                if each is not row or at != place:
                    seen[tuple(padded[order + at - n + 1 : order + at])][each[at]] += 1
        padded = [0] * order + [token + 1 for token in row]
        here = seen[tuple(padded[order + place - n + 1 : order + place])]
        if total := sum(here.values()):
            d = discounts[n - 1]
            p = max(here[row[place]] - d, 0) / total + d * len(here) / total * p
        found.append(p)
    return found[1:]


def test_the_mixture_sums_to_one_and_is_the_same_for_one_token_as_for_all():
    ngrams = mixture(text())
    histories, targets = events(text(seed=3), 4)
    states = torch.randn(len(targets), 5)
    network = torch.randn(len(targets), V).log_softmax(1)
    every = ngrams.log_probabilities(states, histories, network)
    torch.testing.assert_close(every.exp().sum(1), torch.ones(len(targets)))
    shares, each = ngrams.mix(states, histories, targets)
    own = network.gather(1, targets.unsqueeze(1))
    torch.testing.assert_close(
        torch.logsumexp(torch.cat([own, each], 1) + shares, 1), every.gather(1, targets.unsqueeze(1)).squeeze(1)
    )


def model_of(rows, bidirectional=True, **more):
    torch.manual_seed(2)
    model = LanguageModel(
        V, embedding_size=5, hidden_size=6, ngram_counts=4, bidirectional=bidirectional, dropout=0.0, **more
    )
    for counts in model.ngram_counts.values():
        torch.nn.init.normal_(counts.shares.weight)
    both = {"of_forward": counts_of(rows), "of_backward": counts_of(rows, backward=True)}
    model.load_counts({f"{name}.{part}": own for name in both for part, own in both[name].items()})
    return model


@pytest.mark.parametrize("ngrams", [(), (2, 5)])
def test_step_by_step_equals_whole_rows(ngrams):
    rows = text()
    model = model_of(rows, ngram_embeddings=ngrams).eval()
    for row in text(seed=4, rows=6):
        batch = make_batch([row], 0)
        with torch.no_grad():
            read = model.read(batch.tokens, batch.lengths).events
            for direction, order in (("forward", row), ("backward", row[::-1])):
                nats, state = 0.0, None
                for token, after in pairwise(order):
                    logits, state = model(torch.tensor([[token]]), state, direction)
                    assert float(logits.exp().sum()) == pytest.approx(1)
                    nats -= float(logits[0, 0, after])
                assert float(model.nats(direction, read[direction]).sum()) == pytest.approx(nats, rel=1e-5)
                assert float(model.loss(batch.tokens, batch.lengths).nats[direction]) == pytest.approx(nats, rel=1e-5)
                prompt = torch.tensor(order[:-1]).unsqueeze(1)
                last, _ = model.read_prompts(prompt, torch.tensor([len(order) - 1]), direction)
                torch.testing.assert_close(last, logits[0])


def test_the_network_learns_as_if_nothing_were_counted_and_the_gate_learns_too():
    rows = text()
    with_counts, without = (
        model_of(rows),
        LanguageModel(V, embedding_size=5, hidden_size=6, bidirectional=True, dropout=0.0),
    )
    own = dict(with_counts.named_parameters())
    with torch.no_grad():
        for name, weight in without.named_parameters():
            weight.copy_(own[name])
    batch = make_batch(rows[:9], 0)
    for model in (with_counts, without):
        model.train().loss(batch.tokens, batch.lengths).total.backward()
    for name, weight in without.named_parameters():
        torch.testing.assert_close(own[name].grad, weight.grad)
    assert all(weight.grad.abs().sum() > 0 for name, weight in own.items() if name.startswith("counted."))


def test_nothing_counted_is_an_even_guess():
    ngrams = CountedNgrams(3, V, 5)
    histories, targets = events(text(rows=3), 3)
    found = ngrams.mix(torch.zeros(len(targets), 5), histories, targets)
    torch.testing.assert_close(found.log_estimates, torch.full((len(targets), 2), -math.log(V)))


def test_lines_that_follow_on_are_not_counted(small):
    with pytest.raises(ConfigError, match=r"model\.ngram_counts: counts each line by itself"):
        small("model.ngram_counts=3", "batching.carry_state=true", "model.bidirectional=false")
