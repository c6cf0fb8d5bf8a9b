"""Counted n-grams give the probabilities of counting by hand, exclude the event itself in training, and stay whole."""

import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch

import lmtrain
from lmtrain.data.batches.rows import make_batch
from lmtrain.errors import ConfigError, DataError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.counts import CountedNgrams, count_ngrams
from lmtrain.runs import checkpoint
from lmtrain.runs import ngram_counts as counted
from lmtrain.training.start import train

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
def test_step_by_step_a_model_says_what_it_says_of_whole_rows(ngrams):
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


@pytest.fixture
def trained(small, tmp_path, monkeypatch):
    """A run with counts, and its file of them."""
    monkeypatch.chdir(tmp_path)
    train(small("training.max_steps=4", "model.ngram_counts=3"), "run")
    return tmp_path / "run" / counted.COUNTS_FILE


def test_a_run_keeps_its_counts_and_says_so(trained, shell):
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    for state in trained.parent.glob("checkpoints/*/state.json"):
        assert json.loads(state.read_text())["counts"] == digest
    done = shell("check", "run")
    assert done.returncode == 0
    assert f"ngram_counts.safetensors: whole, {trained.stat().st_size:,} bytes" in done.stdout
    model = lmtrain.load("run")
    assert model.evaluate().perplexity < 1e3
    (one,), (other,) = model.generate([""]), model.generate([""])
    assert one == other


def test_all_rows_of_a_batch_are_written_as_each_alone(trained):
    model, prompts = lmtrain.load("run"), ["", "a b", "c d e", "h"]
    together = [each.text for each in model.generate(prompts)]
    assert together == [model.generate([prompt])[0].text for prompt in prompts]


def rewrite(path, change):
    """Other counts, with a checkpoint that asks for them."""
    tensors = checkpoint.tensors_in(path, path.read_bytes())
    change(tensors)
    path.write_bytes(counted.dump_counts(tensors))
    checkpoints = path.parent / "checkpoints"
    for step in checkpoint.steps(checkpoints):
        saved = checkpoint.load(checkpoints, step)
        saved.state["counts"] = hashlib.sha256(path.read_bytes()).hexdigest()
        checkpoint.save(checkpoints, saved)


PAIRS, COUNTS, CONTEXTS = (f"of_forward.3.{name}" for name in ("pairs", "counts", "contexts"))
OTHER = "run/ngram_counts.safetensors: not the counts of this model"
NOT_SOUND = "run/ngram_counts.safetensors: of_forward.3: not counts of a vocabulary of"


def one(name, place, value):
    """A harm to one number."""
    return lambda path: rewrite(path, lambda tensors: tensors[name].__setitem__(place, value))


def change(make):
    """A harm to the counts of one order."""
    return lambda path: rewrite(path, lambda tensors: tensors.update({COUNTS: make(tensors[COUNTS])}))


HARMS = {
    "missing": (lambda path: path.unlink(), "run/ngram_counts.safetensors: no such file or directory"),
    "cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "run/ngram_counts.safetensors: damaged: not the",
    ),
    "a part missing": (lambda path: rewrite(path, lambda tensors: tensors.pop(PAIRS)), OTHER),
    "no tensors": (lambda path: rewrite(path, lambda tensors: tensors.clear()), OTHER),
    "a pair beyond its contexts": (one(PAIRS, -1, 1 << 60), NOT_SOUND),
    "a pair below zero": (one(PAIRS, 0, -1), NOT_SOUND),
    "contexts not ascending": (one(CONTEXTS, 0, 1 << 62), NOT_SOUND),
    "a count of nothing": (one(COUNTS, 0, 0), NOT_SOUND),
    "floats": (change(lambda counts: counts.double()), NOT_SOUND),
    "counts of another length": (change(lambda counts: counts[1:].clone()), NOT_SOUND),
    "counts in a table": (change(lambda counts: counts.unsqueeze(1)), NOT_SOUND),
}


@pytest.mark.parametrize("name", HARMS)
def test_counts_that_can_not_be_used_are_refused_in_a_line(trained, shell, name):
    harm, said = HARMS[name]
    harm(trained)
    for command in (["generate", "run"], ["evaluate", "run"], ["check", "run"]):
        done = shell(*command)
        assert done.returncode == 4, command
        assert done.stderr.startswith(said)
        assert done.stderr.count("\n") == 1


def test_a_resume_counts_anew_and_mends_the_file(trained, small):
    whole = trained.read_bytes()
    for harm in ("missing", "cut short"):
        HARMS[harm][0](trained)
        train(small("training.max_steps=5", "model.ngram_counts=3"), "run", resume=True)
        assert trained.read_bytes() == whole


def test_a_text_too_large_to_count_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "LARGEST_TOKENS", 50)
    with pytest.raises(ConfigError, match=r"model\.ngram_counts: [\d,]+ tokens are too many to count in memory"):
        train(small("model.ngram_counts=3"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_may_lie_farther_apart_than_a_key_is_large():
    contexts, pairs, counts = (
        torch.tensor([-(1 << 62) - 5, (1 << 62) + 5]),
        torch.tensor([3, V + 1]),
        torch.ones(2).int(),
    )
    assert counted._sound(contexts, pairs, counts, V)
    assert not counted._sound(contexts.flip(0), pairs, counts, V)


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
    monkeypatch.setattr(counted, "LARGEST_TOKENS", 5)
    done = shell("generate", "run")
    assert done.returncode == 4
    assert done.stderr.startswith("run/ngram_counts.safetensors: of_forward.1: not counts of a vocabulary")


def test_a_text_of_one_word_is_counted_and_its_counts_are_sound(small, tmp_path):
    for number, text in enumerate(["a\n", "a b\n", "b a c\na\n"]):  # keys of few contexts may lie far apart
        (tmp_path / "few.txt").write_text(text)
        settings = ["data.valid=null", f"data.train={tmp_path}/few.txt", "model.ngram_counts=4", "training.max_steps=2"]
        result = train(small(*settings), tmp_path / f"run-{number}")
        assert lmtrain.load(result.run).generate([""])


def test_lines_that_follow_on_are_not_counted(small):
    with pytest.raises(ConfigError, match=r"model\.ngram_counts: counts lines by themselves"):
        small("model.ngram_counts=3", "batching.carry_state=true", "model.bidirectional=false")
