"""scripts/benchmark.py: both sides train alike on the same tokens, and a ratio is that of what they did."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT, load_script

benchmark = load_script("benchmark")
CPU = torch.device("cpu")
SHAPES = {
    "rows of one length": benchmark.Shape("lstm", 16, 2, 50, benchmark.columns(5, 9), tied=True, optimizer="sgd"),
    "sentences": benchmark.Shape("gru", 16, 1, 50, benchmark.sentences),
    "two directions": benchmark.Shape("lstm", 16, 1, 50, benchmark.sentences, bidirectional=True),
}


def losses(model, batch):
    """The mean nats of each objective that the model has; stock PyTorch sums them up itself."""
    with torch.no_grad():
        if isinstance(model, benchmark.StockModel):
            return {"all": float(model.loss(batch))}
        nats, events = model.loss(batch.tokens, batch.lengths).nats, model.read(batch.tokens, batch.lengths).events
        return {name: float(nats[name]) / len(events[name].targets) for name in nats}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["ours", "other"])
def test_a_side_does_whole_training_steps(name, side):
    """Every weight moves at each run, and the loss of every batch and every objective falls."""
    batches = SHAPES[name].batches(50)[:4]
    shape = replace(SHAPES[name], batches=lambda vocab_size: batches)
    torch.manual_seed(1)
    work = benchmark.training(shape, CPU, "fp32") if side == "ours" else benchmark.stock_training(shape, CPU)
    before = [losses(work.model, batch) for batch in batches]
    for _ in range(5):
        weights = [weight.detach().clone() for weight in work.model.parameters()]
        work.run()
        assert not any(map(torch.equal, weights, work.model.parameters()))
    for _ in range(100):
        work.run()
    for batch, start in zip(batches, before, strict=True):
        for objective, nats in losses(work.model, batch).items():
            assert nats < start[objective] - 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_count_the_same_tokens(name):
    """A run trains on the tokens that it predicts, end tokens included and padding left out."""
    shape = SHAPES[name]
    ours, other = benchmark.training(shape, CPU, "fp32"), benchmark.stock_training(shape, CPU)
    batches = shape.batches(50)
    predicted = sum(int(batch.lengths.sum()) - len(batch.lengths) for batch in batches) / len(batches)
    assert ours.tokens == other.tokens == pytest.approx(predicted, abs=0.5)


def test_a_ratio_is_the_median_of_pairs(monkeypatch):
    """With sides that report made-up speeds."""
    speeds = {"ours": iter([40.0, 90.0, 20.0]), "other": iter([10.0, 10.0, 10.0])}

    class Reporting:
        def __init__(self, row, side, device):
            self.side = side

        def hear(self):
            return {"threads": 2, "device": "cpu"}

        def burst(self, seconds):
            limit = 80.0 if self.side == "ours" else None
            return {"precision": "fp32", "device_mb": 0, "tokens_per_second": next(speeds[self.side]), "limit": limit}

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "Side", Reporting)
    row = benchmark.Row("name", "what", lambda device: None, lambda device: None)
    result = benchmark.measure(row, "cpu", 3, 0.1)
    assert (result["ratio"], result["lowest"], result["highest"]) == (4.0, 2.0, 9.0)
    assert (result["tokens_per_second"], result["other_tokens_per_second"]) == (40.0, 10.0)
    assert (result["share"], result["at_least"]) == (0.5, 6.0)  # 40 of 80; three quarters of 80 over 10


@pytest.mark.parametrize("name", SHAPES)
def test_the_products_of_a_row_have_the_operations_of_its_model(name):
    """Each weight of a matrix takes six operations a token that passes it (two forward, four backward): an LSTM's and a
    GRU's once a direction, the output's once for each objective."""
    shape = SHAPES[name]
    work = benchmark.training(shape, CPU, "fp32")
    matrices = {name: weight.numel() for name, weight in work.model.named_parameters() if weight.dim() == 2}
    output = work.model.output.weight.numel() * len(work.model.objectives)
    weights = output + sum(size for name, size in matrices.items() if not name.startswith(("embedding", "output")))
    counted = sum(2 * each.count * each.rows * each.inner * each.outer for each in work.products)
    assert counted == pytest.approx(6 * weights * work.tokens, rel=0.1)  # rows that end make its rows a step a fraction


def test_the_limit_is_the_time_of_the_products_alone():
    """Twice the products take about twice as long, and no library computes something else."""
    product = benchmark.Product(1, 32, 128, 512)
    ways = benchmark.libraries(product, torch.float32, CPU)
    for way in ways[1:]:
        torch.testing.assert_close(way(), ways[0](), rtol=1e-4, atol=1e-4)
    limits = [benchmark.Limit(benchmark.Work(None, 1, [replace(product, count=each)]), CPU) for each in (1, 1000)]
    assert 0 < limits[0].seconds() < limits[1].seconds()


@pytest.mark.slow
def test_rows_of_every_sort_agree_with_the_speeds_that_they_print():
    names = ["output-layer", "generate-many"]
    command = [sys.executable, "scripts/benchmark.py", "--quick", "--json", *(f"--row={name}" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    results = {result["row"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert list(results) == names
    for result in results.values():  # no ratio of medians lies outside the ratios of the pairs
        ratio = result["tokens_per_second"] / result["other_tokens_per_second"]
        assert 0.995 * result["lowest"] <= ratio <= 1.005 * result["highest"]
        assert result["lowest"] <= result["ratio"] <= result["highest"]
        assert result["ratio"] > 1  # in the README many times that: what is held here is the direction
    assert 0.05 < results["output-layer"]["share"] < 1.5
