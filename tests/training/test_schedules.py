"""Schedules, averaging and what validation leads to."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.errors import ConfigError
from lmtrain.inference.trained_model import load
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs import checkpoint
from lmtrain.runs.weights import named_weights
from lmtrain.training.averaging import Averaging
from lmtrain.training.optimization import learning_rate
from lmtrain.training.start import train
from lmtrain.training.validation import stalled
from tests.notes import Notes

NAMES = ("cosine", "linear", "constant", "plateau", "one_cycle")


def rate(progress, name, step=10**6, **more):
    settings = {"lr": 2.0, "warmup_steps": 100, "final_fraction": 0.1} | more
    return learning_rate(step, progress, name=name, **settings)


@given(st.sampled_from(NAMES), st.floats(0, 1), st.integers(0, 10**6))
def test_the_rate_stays_between_nothing_and_its_peak(name, progress, step):
    assert 0 < rate(progress, name, step=step) <= 2.0


@pytest.mark.parametrize("name", ["cosine", "linear", "one_cycle"])
def test_the_rate_ends_at_its_final_fraction(name):
    assert rate(1.0, name) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_rate_that_is_held_falls_afterwards_as_it_would_have(name):
    assert [rate(p / 10, name, hold_fraction=0.6) for p in range(7)] == [2.0] * 7
    for share in (0.0, 0.25, 0.5, 1.0):
        assert rate(0.6 + 0.4 * share, name, hold_fraction=0.6) == pytest.approx(rate(share, name))


def test_one_cycle_rises_to_its_peak_and_falls():
    assert rate(0.0, "one_cycle") == pytest.approx(2.0 / 25)
    assert rate(0.25, "one_cycle", rise_fraction=0.25) == pytest.approx(2.0)
    rising = [rate(p / 100, "one_cycle", rise_fraction=0.4) for p in range(101)]
    assert rising[:41] == sorted(rising[:41])
    assert rising[40:] == sorted(rising[40:], reverse=True)


def test_plateau_is_cut_to_its_floor_and_constant_is_not_cut():
    assert rate(0.5, "plateau", cut=0.25) == 0.5
    assert rate(0.5, "plateau", cut=0.001) == pytest.approx(0.2)
    assert rate(0.9, "constant") == 2.0


def test_the_non_monotonic_trigger():
    assert not stalled([3, 2, 1], 1)
    assert not stalled([3], 1)
    assert not stalled([1, 2], 1)  # one worse validation may be chance
    assert stalled([1, 2, 3], 1)
    assert not stalled([1, 2, 0.5], 1)
    assert stalled([5, 1, 2, 2, 1.5], 2)


def tiny():
    torch.manual_seed(1)
    return LanguageModel(7, embedding_size=3, hidden_size=4)


def move(model):
    """A random step."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


def test_the_exponential_average_is_what_its_recursion_says():
    model = tiny()
    averaging = Averaging(model, name="ema", decay=0.6)
    wanted = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    for step in range(1, 12):
        move(model)
        averaging.update()
        decay = min(0.6, (1 + step) / (10 + step))
        wanted = {name: decay * old + (1 - decay) * named_weights(model)[name] for name, old in wanted.items()}
    for name, average in averaging.averages.items():
        torch.testing.assert_close(average, wanted[name])


def test_the_vectors_of_ngrams_are_taken_as_they_are():
    model = LanguageModel(9, embedding_size=4, hidden_size=5, ngram_embeddings=[2], ngram_embedding_buckets=8)
    averaging = Averaging(model, name="ema", decay=0.9)
    move(model)
    averaging.update()
    vectors = model.ngram_embeddings["of_forward"].weight.detach().clone()
    assert set(averaging.averages) == set(named_weights(model)) - {"ngram_embeddings.of_forward.weight"}
    with averaging.applied():
        assert torch.equal(model.ngram_embeddings["of_forward"].weight, vectors)


def test_the_triggered_average_is_the_mean_of_all_steps_since():
    model = tiny()
    averaging = Averaging(model, name="triggered", decay=0.5)
    move(model)
    averaging.update()
    assert not averaging.active
    averaging.begin()
    seen = [{name: weight.detach().clone() for name, weight in named_weights(model).items()}]
    for _ in range(6):
        move(model)
        averaging.update()
        seen.append({name: weight.detach().clone() for name, weight in named_weights(model).items()})
    for name, average in averaging.averages.items():
        torch.testing.assert_close(average, torch.stack([each[name] for each in seen]).mean(0))


def test_weights_are_the_same_bit_for_bit_after_the_average_stood_in_for_them():
    model = tiny()
    averaging = Averaging(model, name="ema", decay=0.9)
    move(model)
    averaging.update()
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    with averaging.applied():
        assert all(torch.equal(weight, averaging.averages[name]) for name, weight in named_weights(model).items())
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_the_average_is_what_is_validated_and_saved(small, tmp_path):
    config = small("averaging.name=ema", "averaging.decay=0.9", "model.bidirectional=false")
    result = train(config, tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "checkpoints", result.best_step)
    loaded = load(result.run)
    assert loaded.step == result.best_step
    for name, weight in named_weights(loaded.model).items():
        assert torch.equal(weight, saved.model[name])
        assert not torch.equal(weight, saved.training[f"weights/{name}"])
    found = loaded.evaluate(["valid.txt"]).tallies["forward"].nats_per_token
    assert found == pytest.approx(result.figures["valid/loss"], rel=1e-5)


def test_triggered_averaging_begins_where_validation_stalls(small, tmp_path):
    notes = Notes()
    config = small(
        "averaging.name=triggered", "averaging.trigger=1", "optimizer.lr=0.3", "training.max_epochs=6",
        "model.bidirectional=false",
    )  # fmt: skip
    train(config, tmp_path / "run", progress=notes)
    losses = [
        json.loads(line).get("valid/loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [loss for loss in losses if loss is not None]
    begun = next(k for k in range(1, len(losses) + 1) if stalled(losses[:k], 1))
    (said,) = [line for line in notes.notes if "averaging the weights from here" in line]
    assert said.startswith(f"step {begun * 6}:")


def test_plateau_goes_back_to_the_best_weights_at_a_lower_rate(small, tmp_path):
    notes = Notes()
    config = small(
        "schedule.name=plateau", "schedule.patience=1", "schedule.factor=0.5", "schedule.warmup_steps=0",
        "optimizer.lr=0.5", "training.max_epochs=4", "logging.every_steps=1", "model.bidirectional=false",
    )  # fmt: skip
    train(config, tmp_path / "run", progress=notes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = list(dict.fromkeys(row["train/learning_rate"] for row in rows if "train/learning_rate" in row))
    cuts = [line for line in notes.notes if "at a lower learning rate" in line]
    assert cuts
    assert rates == [0.5 / 2**n for n in range(len(rates))]
    assert len(rates) >= len(cuts)  # the last cut may come at the end


def test_a_rollback_takes_up_the_saved_weights(small, tmp_path, monkeypatch):
    from lmtrain.training.trainer import Trainer

    taken = []
    react = Trainer._react

    def noted(self, loss, improved):
        before = self.state.cut
        react(self, loss, improved)
        if self.state.cut != before:
            best = checkpoint.load(self.run.checkpoints, self.state.best_step)
            taken.append(all(torch.equal(w, best.model[name]) for name, w in named_weights(self.model).items()))

    monkeypatch.setattr(Trainer, "_react", noted)
    train(small("schedule.name=plateau", "optimizer.lr=0.5", "training.max_epochs=4"), tmp_path / "run")
    assert taken
    assert all(taken)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["averaging.name=triggered", "data.valid=null"], "averaging.name: triggered waits for validations"),
        (["averaging.name=triggered", "training.patience=3"], "averaging.trigger: .* ends the run before"),
        (["averaging.name=triggered", "schedule.name=plateau"], "averaging.name: .*use one of them"),
        (["schedule.name=plateau", "data.valid=null"], "schedule.name: plateau waits for validations"),
        (["schedule.name=plateau", "schedule.patience=3", "training.patience=2"], "schedule.patience: .* ends the run"),
        (
            ["schedule.name=plateau", "schedule.patience=2", "training.max_steps=10", "validation.every_steps=5"],
            "schedule.patience: never fires: .* leaves 2 validations",
        ),
        (["schedule.name=plateau", "training.max_minutes=1"], "schedule.name: plateau may never fire"),
        (["model.ngram_embeddings=[2, 2]"], "model.ngram_embeddings: names an order twice"),
        (
            ["model.output=adaptive", "model.tie_weights=false", "regularization.label_smoothing=0.1"],
            "regularization.label_smoothing: spreads",
        ),
    ],
    ids=str,
)
def test_what_can_not_work_together_is_refused_in_words(small, overrides, said):
    with pytest.raises(ConfigError, match=said):
        small(*overrides)


def test_averaging_does_not_change_in_a_resume(small, tmp_path):
    train(small(), tmp_path / "run", stop_at_step=2)
    with pytest.raises(ConfigError, match=r"averaging.name: the run was begun with None, not 'ema'"):
        train(small("averaging.name=ema"), tmp_path / "run", resume=True)


def test_every_schedule_runs_on_a_time_budget(small, tmp_path):
    for name in NAMES:
        for minutes in (0.03, 0.3):  # a busy machine may not come to many steps at first
            config = small(
                f"schedule.name={name}", f"training.max_minutes={minutes}", "training.max_epochs=9999",
                "logging.every_steps=1", "validation.every_steps=5", "model.bidirectional=false",
                "logging.sample_prompts=[]",
            )  # fmt: skip
            run = train(config, tmp_path / f"{name}-{minutes}").run
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            rates = [row["train/learning_rate"] for row in rows if "train/loss" in row]
            if len(rates) > 20:
                break
        if name in ("cosine", "linear", "one_cycle"):
            assert rates[-1] < 0.3 * max(rates)
        elif name == "constant":
            assert set(rates[3:]) == {0.01}  # behind the warm-up
        else:
            assert rates[3:] == sorted(rates[3:], reverse=True)
            cuts = {round(0.01 / rate, 6) for rate in rates[3:]}
            assert cuts <= {1.0, 4.0, 16.0, 20.0}  # to a quarter each, and to a twentieth at most
