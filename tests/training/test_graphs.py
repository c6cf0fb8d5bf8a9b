"""CUDA graphs: whole passes, recorded once for each shape, train like passes that launch their kernels one by one."""

import pytest
import torch

from lmtrain.config import Config
from lmtrain.data.batches.loader import RankBatch
from lmtrain.data.batches.rows import make_batch
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.device import scoped_settings
from lmtrain.training import graphs
from lmtrain.training.graphs import BatchGraphs
from lmtrain.training.step import TrainingStep

ROWS = [[1, 5, 6, 7, 2], [1, 8, 2], [1, 2], [1, 4, 9, 9, 9, 3, 2]]
OTHER_ROWS = [[1, 5, 2], [1, 8, 7, 5, 5, 7, 2], [1, 6, 2], [1, 4, 9, 9, 2]]  # padded to the same shape
LONG_ROWS = [[1, *range(3, 15), 2], [1, 8, 7, 5, 5, 7, 2]]
EQUAL_ROWS = [[1, 5, 6, 7, 2], [1, 8, 8, 4, 2]]


def model_of(device, **options):
    torch.manual_seed(1)
    options = {"num_layers": 2, "bidirectional": True, **options}
    return LanguageModel(20, embedding_size=6, hidden_size=8, **options).to(device)


def step_of(model, columns=None, precision="fp32"):
    settings = {"name": "graphs", "data": {"train": "none"}, "optimizer": {"lr": 0.01}}
    step = TrainingStep(Config.model_validate(settings), model, columns)
    step.precision = precision
    return step


def rank_batch(rows, lay_out):
    batch = make_batch(rows, 0)
    tokens = int(batch.lengths.sum())
    return RankBatch(batch, len(rows), tokens, len(batch.tokens), layout=lay_out(*batch))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("steps", [6, 8])
def test_padded_rows_have_the_loss_and_gradients_of_packed_ones(cell, bidirectional, steps):
    model, batch = model_of("cpu", cell=cell, bidirectional=bidirectional).double(), make_batch(ROWS, 0)
    factors = {name: 0.5 + place for place, name in enumerate(model.objectives)}
    results = []
    for padded_steps in (None, steps):
        model.zero_grad()
        layout = model.lay_out(*batch, padded_steps)
        assert layout.rows.equal == (padded_steps is not None)
        losses = model.loss(batch.tokens, batch.lengths, factors, None, layout)
        losses.total.backward()
        results.append((losses.total.detach(), losses.nats, [weight.grad.clone() for weight in model.parameters()]))
    torch.testing.assert_close(*results)


def test_gradients_in_kept_memory_train_like_new_ones(monkeypatch):
    """Two batches a step, step after step: the gradients begin each step as zeros."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 0)  # a graph can't be recorded here
    results = []
    for kept in (False, True):
        step = step_of(model_of("cpu"))
        lay_out = step.model.lay_out
        if kept:
            step.gradients._graphs = BatchGraphs(step.model, carries_state=False)
            lay_out = step.gradients.lay_out
        figures = [
            step([rank_batch(rows, lay_out) for rows in each], 0.01)
            for each in ([ROWS, LONG_ROWS], [OTHER_ROWS, EQUAL_ROWS], [EQUAL_ROWS])
        ]
        weights = [weight.detach().clone() for weight in step.model.parameters()]
        results.append(([each.nats for each in figures], [each.gradient_norm for each in figures], weights))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_what_can_not_be_recorded_is_not():
    """No model on the CPU; and on a device none that looks at values to know a size, see the CUDA test."""
    assert not BatchGraphs.can_record(model_of("cpu"))


def trained(batches, graphs, model, columns, precision):
    """The figures of six steps, the weights after them, and the state of the random generator."""
    step = step_of(model, columns, precision)
    torch.manual_seed(2)
    figures = []
    for number in range(6):
        each = [rank_batch(rows, step.lay_out) for rows in batches[number % len(batches)]]
        figures.append(step(each, 0.01, number + 1)[:6])
    assert len(step.gradients._graphs._graphs) == graphs
    return figures, [weight.detach().cpu() for weight in step.model.parameters()], torch.cuda.get_rng_state()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_graph_trains_like_its_kernels_one_by_one(cell, carried, precision, monkeypatch):
    """To the last bit, with every kind of dropout, and however many batches a step has."""
    results = []
    options = {"dropout": 0.2, "weight_dropout": 0.1, "input_dropout": 0.1, "embedding_dropout": 0.1}
    batches = [[EQUAL_ROWS], [EQUAL_ROWS, EQUAL_ROWS]] if carried else [[ROWS, LONG_ROWS], [OTHER_ROWS], [EQUAL_ROWS]]
    for most in (graphs.MOST_GRAPHS, 0):
        monkeypatch.setattr(graphs, "MOST_GRAPHS", most)
        with scoped_settings(torch.device("cuda")):
            model = model_of("cuda", cell=cell, bidirectional=not carried, **options)
            recorded = (1 if carried else 3) if most else 0
            results.append(trained(batches, recorded, model, 2 if carried else None, precision))
    (figures, weights, random), (plain_figures, plain_weights, plain_random) = results
    assert figures == plain_figures
    assert all(map(torch.equal, weights, plain_weights))
    assert torch.equal(random, plain_random)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    "options", [{"output": "adaptive", "tie_weights": False}, {"sampled_tokens": 4}, {"ngram_counts": 3}]
)
def test_a_model_with_sizes_that_depend_on_values_is_not_recorded(options):
    assert BatchGraphs.can_record(model_of("cuda"))
    assert not BatchGraphs.can_record(model_of("cuda", **options))
