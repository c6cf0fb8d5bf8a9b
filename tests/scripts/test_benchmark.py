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
            speed = next(speeds[self.side])
            rates = {"tokens_per_second": speed, "rate": 3 * speed, "product_rate": 240.0}
            return {"precision": "fp32", "device_mb": 0} | rates

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "Side", Reporting)
    row = benchmark.Row("name", "what", 2.0, lambda device: None, lambda device: None)
    result = benchmark.measure(row, "cpu", 3, 0.1)
    assert (result["ratio"], result["lowest"], result["highest"]) == (4.0, 2.0, 9.0)
    assert (result["tokens_per_second"], result["other_tokens_per_second"]) == (40.0, 10.0)
    speeds["ours"] = iter([40.0, 90.0, 20.0])
    result = benchmark.measure(replace(row, other=None), "cpu", 3, 0.1)  # a fraction of the machine's product rate
    assert (result["ratio"], result["other_tokens_per_second"]) == (0.5, None)


@pytest.mark.slow
def test_rows_of_every_sort_agree_with_the_speeds_that_they_print():
    names = ["output-layer", "product-share", "generate-many"]
    command = [sys.executable, "scripts/benchmark.py", "--quick", "--json", *(f"--row={name}" for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    results = {result["row"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert list(results) == names
    for name in ("output-layer", "generate-many"):  # no ratio of medians lies outside the ratios of the pairs
        result = results[name]
        ratio = result["tokens_per_second"] / result["other_tokens_per_second"]
        assert 0.995 * result["lowest"] <= ratio <= 1.005 * result["highest"]
        assert result["lowest"] <= result["ratio"] <= result["highest"]
        assert result["ratio"] > 1  # in the README many times that: what is held here is the direction
    assert 0.05 < results["product-share"]["ratio"] < 1.1
