"""The output layer's loss against PyTorch's, values and gradients; and the gradient of the embedding it may share."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from lmtrain.data.batches.rows import make_batch
from lmtrain.model import output as output_module
from lmtrain.model.embedding import Lookups
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.output import AdaptiveOutput, FullOutput
from lmtrain.training.optimization import build_optimizers, clip_gradient, has_sparse_embedding
from tests.conftest import ROOT, bf16_is_emulated

EVENTS, SIZE, VOCABULARY = 23, 6, 41


@pytest.fixture(params=[(4096, 1 << 28), (8, 1 << 28), (7, 2000), (41, 1)], ids=str)
def _cut(request, monkeypatch):
    """Chunks and blocks of several sizes: one of each, several chunks, several blocks, a block a row."""
    monkeypatch.setattr(output_module, "CHUNK", request.param[0])
    monkeypatch.setattr(output_module, "BUFFER_BYTES", request.param[1])


def case(dtype, scale=1.0):
    torch.manual_seed(1)
    layer = FullOutput(SIZE, VOCABULARY).to(dtype)
    with torch.no_grad():
        layer.bias.normal_()
        layer.weight.normal_().mul_(scale)
    states = torch.randn(EVENTS, SIZE, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (EVENTS,))
    targets[:2] = torch.tensor([0, VOCABULARY - 1])
    weights = torch.rand(EVENTS, dtype=dtype)
    weights[3] = 0
    return layer, states, targets, weights


def gradients(total, *of):
    return [total, *torch.autograd.grad(total, of)]


def plain(layer, states, targets, weights):
    nats = F.cross_entropy(layer(states), targets, reduction="none")
    return nats, gradients((nats * weights).sum(), states, layer.weight, layer.bias)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4], ids=["usual", "far logits", "logits beyond the range of exp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_equal_torch(dtype, tolerance, scale):
    layer, states, targets, weights = case(dtype, scale)
    nats, wanted = plain(layer, states, targets, weights)
    loss = layer.loss(states, targets, weights)
    ours = gradients(3 * loss.total, states, layer.weight, layer.bias)
    assert not loss.nats.requires_grad
    torch.testing.assert_close(loss.nats, nats.detach(), rtol=tolerance, atol=tolerance * scale)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine / 3, theirs, rtol=tolerance, atol=tolerance * scale)
    with torch.no_grad():
        torch.testing.assert_close(layer.loss(states, targets, weights).nats, loss.nats, rtol=0, atol=0)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_bf16_stays_within_its_rounding(scale):
    layer, states, targets, weights = case(torch.float32, scale)
    with torch.no_grad():  # what is read in bf16 can be read exactly
        for tensor in (layer.weight, layer.bias, states):
            tensor.copy_(tensor.bfloat16())
    nats, wanted = plain(layer, states, targets, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer.loss(states, targets, weights)
    assert loss.nats.dtype == loss.total.dtype == torch.float32
    logits = layer(states).detach()
    assert (loss.nats - nats).abs().max() <= 2**-8 * logits.abs().max()  # a logit's own rounding
    for mine, theirs in zip(gradients(loss.total, states, layer.weight, layer.bias)[1:], wanted[1:], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= (0.02 if scale == 1 else 0.3) * theirs.norm()


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing):
    layer, states, targets, weights = case(torch.float64)
    more = (targets, weights, smoothing, True)
    assert torch.autograd.gradcheck(
        lambda *given: output_module._SoftmaxLoss.apply(*given, *more)[0],
        (states, layer.weight, layer.bias),
        fast_mode=True,
    )


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("scale", [1, 300])
def test_label_smoothing_equals_torch_and_leaves_the_nats_alone(scale):
    layer, states, targets, weights = case(torch.float64)
    states = (states.detach() * scale).requires_grad_()
    loss = layer.loss(states, targets, weights, label_smoothing=0.2)
    each = F.cross_entropy(layer(states), targets, reduction="none", label_smoothing=0.2)
    wanted = (each * weights).sum()
    found = gradients(loss.total, states, layer.weight, layer.bias)
    for mine, theirs in zip(found, gradients(wanted, states, layer.weight, layer.bias), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss.total, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(loss.nats, layer.loss(states, targets, weights).nats)


def test_a_sampled_vocabulary_estimates_the_whole_without_bias():
    """Over many samples the sum of exponentials averages to the true one; what is certain is exact."""
    torch.manual_seed(6)
    layer = FullOutput(4, 60).double()
    states, targets = torch.randn(5, 4).double(), torch.tensor([3, 50, 7, 50, 59])
    logits = layer(states).detach()
    whole, sums = logits.exp().sum(1), torch.zeros(5).double()
    for _ in range(4000):
        tokens, places, correction = output_module.sample_vocabulary(targets, 60, 10, 8)
        assert torch.equal(tokens[places], targets)
        assert set(range(10)) <= set(tokens.tolist())
        assert not correction[tokens < 10].any()
        assert not correction[places].any()
        sums += (logits[:, tokens] + correction).exp().sum(1)
    torch.testing.assert_close(sums / 4000, whole, rtol=0.01, atol=0)
    sample = output_module.sample_vocabulary(targets, 60, 10, 1000)  # all of it
    ones = torch.ones(5).double()
    torch.testing.assert_close(
        layer.loss(states, targets, ones, sample=sample).nats, layer.loss(states, targets, ones).nats
    )


def test_sampling_gives_the_gradient_of_what_it_scored():
    torch.manual_seed(7)
    model = LanguageModel(50, embedding_size=8, hidden_size=8, dropout=0.0, sampled_tokens=5, frequent_tokens=10)
    batch = make_batch([[1, 4, 45, 6, 2], [1, 4, 7, 2]], 0)
    torch.manual_seed(8)
    model.loss(*batch[:2]).total.backward()
    torch.manual_seed(8)
    sample = output_module.sample_vocabulary(torch.tensor([4, 4, 45, 7, 6, 2, 2]), 50, 10, 5)
    absent = torch.ones(50, dtype=torch.bool).index_fill_(0, torch.cat([sample.tokens, torch.tensor([1])]), False)
    assert not model.embedding.weight.grad[absent].any()
    assert model.embedding.weight.grad[sample.tokens].any(1).all()
    exact = [model.eval().loss(*batch[:2]).nats["forward"] for _ in range(2)]
    assert torch.equal(*exact)


def test_not_a_number_stays_one():
    layer, states, targets, weights = case(torch.float32)
    with torch.no_grad():
        states[5, 0] = torch.nan
    assert layer.loss(states, targets, weights).nats.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.usefixtures("_cut")
def test_adaptive_loss_and_gradients_equal_torch():
    torch.manual_seed(2)
    layer = AdaptiveOutput(16, 90).double()
    states = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 90, (40,)), torch.rand(40, dtype=torch.float64)
    nats = -layer.clusters(states, targets).output
    wanted = gradients((nats * weights).sum(), states, *layer.parameters())
    loss = layer.loss(states, targets, weights)
    torch.testing.assert_close(loss.nats, nats.detach())
    torch.testing.assert_close(gradients(loss.total, states, *layer.parameters()), wanted)
    torch.testing.assert_close(loss.nats, -layer.double().log_probabilities(states)[range(40), targets].detach())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lookups", [1, 2])
def test_gradients_of_lookups_are_added_to_that_of_the_output_layer(tied, lookups):
    torch.manual_seed(3)
    weight = torch.randn(9, 4, requires_grad=True)
    tokens, factors = [torch.tensor([1, 1, 8]), torch.tensor([0, 8])][:lookups], torch.randn(9, 4)

    def total(look_up, whole):
        looked_up = sum((look_up(each) ** 3).sum() for each in tokens)
        return looked_up + ((whole * factors).sum() * looked_up if tied else 0)

    wanted = torch.autograd.grad(total(lambda each: F.embedding(each, weight), weight), weight)
    ours = Lookups(weight)
    torch.testing.assert_close(torch.autograd.grad(total(ours, ours.tied() if tied else None), weight), wanted)
    assert ours.gradient is None
    assert ours.pending == 0


def test_a_tied_weights_gradient_is_never_copied():
    model = LanguageModel(50, embedding_size=8, hidden_size=8, bidirectional=True)
    losses = model.loss(*make_batch([[1, 4, 5, 6, 2], [1, 4, 7, 2]], 0)[:2])
    made = [gradient.data_ptr() for gradient in losses.total.grad_fn.saved_tensors]
    losses.total.backward()
    assert model.embedding.weight.grad.data_ptr() in made


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sparse_embedding_gradient_makes_the_same_steps(accumulate):
    models = []
    for sparse in (True, False):
        torch.manual_seed(4)
        model = LanguageModel(50, embedding_size=8, hidden_size=8, tie_weights=False, bidirectional=True)
        assert has_sparse_embedding(model, "sgd", weight_decay=0.0)
        model.embedding.sparse = sparse
        (optimizer,) = build_optimizers(model, name="sgd", lr=0.5, betas=(0.9, 0.9), weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            for rows in ([[1, 4, 5, 6, 2], [1, 4, 7, 2]], [[1, 7, 2]])[:accumulate]:
                model.loss(*make_batch(rows, 0)[:2]).total.backward()
            assert model.embedding.weight.grad.is_sparse == sparse
            assert clip_gradient(model.parameters(), 0.3) > 0.3
            assert clip_gradient(model.parameters(), None) == pytest.approx(0.3)
            optimizer.step()
        models.append(list(model.parameters()))
    torch.testing.assert_close(models[0], models[1])


def test_other_optimizers_take_the_whole_gradient():
    tied = LanguageModel(50, embedding_size=8, hidden_size=8)
    assert not has_sparse_embedding(tied, "sgd", weight_decay=0.0)
    model = LanguageModel(50, embedding_size=8, hidden_size=8, tie_weights=False)
    assert not has_sparse_embedding(model, "sgd", weight_decay=0.1)
    assert not has_sparse_embedding(model, "adamw", weight_decay=0.0)


LARGE = """
import resource, sys, torch
from lmtrain.data.batches.rows import make_batch
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.device import autocast, keep_freed_memory
from lmtrain.training.optimization import build_optimizers, clip_gradient

keep_freed_memory()
model = LanguageModel(200_000, embedding_size=512, hidden_size=512, num_layers=2, tie_weights=sys.argv[2] == "tied")
(optimizer,) = build_optimizers(model, name="adamw", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
batch = make_batch(torch.randint(4, 200_000, (64, 65)).tolist(), 0)
def step(batch):
    optimizer.zero_grad(set_to_none=True)
    with autocast(sys.argv[1], torch.device("cpu")):
        losses = model.loss(batch.tokens, batch.lengths)
    losses.total.backward()
    clip_gradient(model.parameters(), 1.0)
    optimizer.step()
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()  # its state is there, and the gradients are
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
step(batch)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("precision", "tied"), [("fp32", "tied"), ("bf16", "untied")])
def test_a_large_vocabulary_takes_bounded_memory(precision, tied):
    if precision == "bf16" and bf16_is_emulated():
        pytest.skip("bf16 products are emulated on this processor and would take a quarter of an hour")
    command = [sys.executable, "-c", LARGE, precision, tied]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two wait for each other where another test has the other core
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=one_thread)
    assert int(done.stdout) < 1.2e9
