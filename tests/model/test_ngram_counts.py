"""Counted n-grams: the probabilities of counting by hand, and what training excludes from the counts."""

import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.counting import count_ngrams
from lmtrain.model.ngrams.history import History, context_of
from lmtrain.model.ngrams.mixture import NgramMixture
from lmtrain.model.ngrams.recent import RecentTokens

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


def counted_of(rows, order=4, recent_tokens=None):
    torch.manual_seed(1)
    ngrams = NgramMixture(order, recent_tokens, V, 5)
    torch.nn.init.normal_(ngrams.weights.weight)
    ngrams.load_counts(counts_of(rows, order))
    return ngrams


def events(rows, order):
    """(history, target) of every event, the last tokens last, ids + 1, 0 where there was nothing."""
    return [
        (tuple(([0] * order + [token + 1 for token in row[:at]])[-(order - 1) :]), row[at])
        for row in rows
        for at in range(1, len(row))
    ]


def history_of(tokens):
    """Of events (N,) whose last tokens (N, K) are given, ids + 1."""
    count, size = tokens.shape
    return History(tokens.t(), torch.full((count,), size - 1), torch.arange(count))


def as_tensors(found):
    return history_of(torch.tensor([history for history, _ in found])), torch.tensor([target for _, target in found])


def tables_by_hand(found, order):
    """Of each order, how often each token was counted after each context."""
    tables = []
    for n in range(order, 0, -1):
        table: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for history, target in found:
            table[history[len(history) - n + 1 :]][target] += 1
        tables.insert(0, table)
        # the shorter n-grams are counted once for each different longer one
        found = [(history, target) for history, targets in table.items() for target in targets]
    return tables


def discounts_by_hand(table):
    n = Counter(count for targets in table.values() for count in targets.values())
    share = n[1] / max(1, n[1] + 2 * n[2])
    return [0] + [min(0.95 * k, max(0.05, k - (k + 1) * share * n[k + 1] / max(1, n[k]))) for k in (1, 2, 3)]


class Hand:
    """Estimates by counting in dictionaries, with the discounts and the order 1 of all events."""

    def __init__(self, rows, order):
        self.found, self.order = events(rows, order), order
        tables = tables_by_hand(self.found, order)
        self.discounts = [discounts_by_hand(table) for table in tables]
        total, d = sum(tables[0][()].values()), self.discounts[0]
        left = sum(d[min(3, count)] for count in tables[0][()].values())
        self.unigram = [
            (count - d[min(3, count)] + left / V) / total for count in (tables[0][()][token] for token in range(V))
        ]

    def estimates(self, event, found=None):
        """The estimate of each order from 2 up, from the events `found`; None: from all."""
        history, target = event
        p, every = self.unigram[target], []
        for n, table in list(enumerate(tables_by_hand(self.found if found is None else found, self.order), 1))[1:]:
            here = table[history[self.order - n :]]
            if total := sum(here.values()):
                d = {token: self.discounts[n - 1][min(3, count)] for token, count in here.items()}
                p = (here[target] - d.get(target, 0)) / total + sum(d.values()) / total * p
            every.append(p)
        return pytest.approx(every, rel=1e-5)


def estimates(ngrams, found, columns=None):
    histories, targets = as_tensors(found)
    return ngrams.mix(torch.zeros(len(targets), 5), histories, targets, columns).log_estimates.exp().tolist()


def test_the_estimates_are_those_of_counting_by_hand():
    rows, order = text(), 4
    hand, asked = Hand(rows, order), events(text(seed=2), order)
    for own, event in zip(estimates(counted_of(rows, order), asked), asked, strict=True):
        assert own == hand.estimates(event)


def test_in_training_an_event_is_left_out_of_the_counts_that_predict_it():
    rows, order = text(rows=12), 4
    hand = Hand(rows, order)
    found = estimates(counted_of(rows, order), hand.found, torch.zeros(len(hand.found), dtype=torch.int64))
    for at, event in enumerate(hand.found):
        assert found[at] == hand.estimates(event, hand.found[:at] + hand.found[at + 1 :])


@pytest.mark.parametrize("first_column", [0, 2])
def test_in_training_on_a_stream_its_whole_column_is_left_out(first_column):
    drawn = random.Random(3)
    row, order, columns = [EOS, *drawn.choices(range(3, V), weights=(9, 5, 3, 2, 1, 1), k=90)], 4, 5
    column = torch.tensor([0, *(at * columns // 90 for at in range(90))])
    ngrams = counted_of([row], order)
    ngrams.load_columns(count_ngrams(torch.tensor(row), torch.arange(91), order, V, column), first_column)
    hand = Hand([row], order)
    found = estimates(ngrams, hand.found, column[1:] - first_column)
    for at, event in enumerate(hand.found):
        others = [each for other, each in zip(column[1:], hand.found, strict=True) if other != column[at + 1]]
        assert found[at] == hand.estimates(event, others)
    assert estimates(ngrams, hand.found)[7] == hand.estimates(hand.found[7])  # else nothing is left out


def recent_tokens(size):
    torch.manual_seed(2)
    recent = RecentTokens(size, V)
    torch.nn.init.normal_(recent.of_age)
    torch.nn.init.normal_(recent.of_match)
    return recent


def test_recent_tokens_are_weighed_by_age_and_by_match():
    recent = recent_tokens(9)
    tokens = torch.tensor([5, 3, 4, 5, 3, 4, 8, 3, 4])  # "3 4" stands before 5 and 8, and "5 3 4" before 8
    every, features = recent.estimates(tokens.unsqueeze(0) + 1)
    assert features[0].expm1().round().tolist() == [9, 2, 2, 0, 0, 0]
    matches, ages = [0, 0, 0, 2, 0, 0, 2, 0, 0], [3, 3, 2, 2, 2, 2, 1, 1, 0]
    each = recent.of_match.detach()[matches] + recent.of_age.detach()[ages]
    weights = torch.cat([torch.zeros(1), each]).softmax(0)
    by_hand = torch.full((V,), float(weights[0]) / V).index_add(0, tokens, weights[1:])
    torch.testing.assert_close(every[0], by_hand)


@pytest.mark.parametrize("size", [7, 16, 17])
def test_recent_tokens_give_one_target_what_they_give_it_among_all(size):
    """In rows that began before, began here, or have read a few tokens before; the gradients agree, too."""
    recent, drawn = recent_tokens(size), torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 7, (25, 3), generator=drawn)
    before = torch.randint(4, 8, (3, size - 1), generator=drawn)
    before[1], before[2, : size - 3] = 0, 0
    history = History(context_of(tokens, size - 1, before), torch.arange(75) // 3 + size - 1, torch.arange(75) % 3)
    targets = torch.randint(1, 7, (75,), generator=drawn)
    every, of_every = recent.estimates(history.last(size))
    torch.testing.assert_close(every.sum(1), torch.ones(75))
    one, of_one = recent.estimate(history, targets)
    torch.testing.assert_close(of_one, of_every)
    torch.testing.assert_close(one, every.gather(1, targets.unsqueeze(1)).squeeze(1))
    weights = recent.of_match, recent.of_age
    for ours, theirs in zip(
        torch.autograd.grad(one.log().sum(), weights),
        torch.autograd.grad(every.gather(1, targets.unsqueeze(1)).log().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("recent_tokens", [None, 8])
def test_the_mixture_sums_to_one_and_is_the_same_for_one_token_as_for_all(recent_tokens):
    ngrams = counted_of(text(), recent_tokens=recent_tokens)
    histories, targets = as_tensors(events(text(seed=3), 9))
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
    options = {"ngram_counts": 4, "embedding_size": 5, "hidden_size": 6, "dropout": 0.0, **more}
    model = LanguageModel(V, bidirectional=bidirectional, **options)
    for mixture in model.mixtures.values():
        torch.nn.init.normal_(mixture.weights.weight)
    both = {"of_forward": counts_of(rows), "of_backward": counts_of(rows, backward=True)}
    if options["ngram_counts"] is not None:
        model.load_counts({f"{name}.{part}": own for name in both for part, own in both[name].items()})
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngram_embeddings": (2, 5)},
        {"recent_tokens": 8},
        {"ngram_embeddings": (2,), "recent_tokens": 9},
        {"ngram_counts": None, "recent_tokens": 7},
    ],
)
def test_step_by_step_equals_whole_rows(options):
    rows = text()
    model = model_of(rows, **options).eval()
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
    assert all(weight.grad.abs().sum() > 0 for name, weight in own.items() if name.startswith("mixtures."))


def test_nothing_counted_is_an_even_guess():
    found = estimates(NgramMixture(3, None, V, 5), events(text(rows=3), 3))
    assert found == [pytest.approx([1 / V, 1 / V])] * len(found)


def test_lines_that_follow_on_are_not_counted(small):
    with pytest.raises(ConfigError, match=r"model\.ngram_counts: counts each line by itself"):
        small("model.ngram_counts=3", "batching.carry_state=true", "model.bidirectional=false")
