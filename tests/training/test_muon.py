"""Muon: what its steps are, and which weights it moves."""

import pytest
import torch

from lmtrain.model.language_model import LanguageModel
from lmtrain.training.muon import ITERATIONS, Muon, orthogonalised
from lmtrain.training.optimization import build_optimizers, optimizer_step, set_learning_rate

SHAPES = [(24, 24), (96, 24), (24, 96), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    rows, columns = shape
    rank = min(shape)
    left = torch.linalg.qr(torch.randn(rows, rank)).Q
    right = torch.linalg.qr(torch.randn(columns, rank)).Q
    values = torch.linspace(1, 0.2, rank)
    found = orthogonalised(left @ torch.diag(values) @ right.T)
    inner = left.T @ found @ right
    torch.testing.assert_close(found, left @ inner @ right.T, rtol=0, atol=2e-4)
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=2e-4)
    assert ((inner.diagonal() > 0.5) & (inner.diagonal() < 1.25)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_equals_pytorch_within_rounding(shape):
    from torch.optim import _muon

    torch.manual_seed(1)
    matrix = torch.randn(shape)
    theirs = _muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), ITERATIONS, 1e-7)
    torch.testing.assert_close(orthogonalised(matrix), theirs.float(), rtol=0, atol=0.05)


def test_the_size_of_a_gradient_does_not_matter_and_no_gradient_is_no_step():
    torch.manual_seed(2)
    matrix = torch.randn(8, 5)
    torch.testing.assert_close(orthogonalised(matrix * 1e-6), orthogonalised(matrix))
    assert torch.equal(orthogonalised(torch.zeros(8, 5)), torch.zeros(8, 5))
    weight = torch.nn.Parameter(matrix.clone())
    Muon([{"params": [weight]}], 0.1).step()
    assert torch.equal(weight, matrix)


def test_a_step_is_the_orthogonal_matrix_scaled_and_the_decay_is_apart():
    weight = torch.nn.Parameter(torch.randn(8, 2))
    before = weight.detach().clone()
    weight.grad = torch.randn(8, 2)
    Muon([{"params": [weight]}], 0.1, weight_decay=0.5).step()
    # the first step's momentum is a multiple of the gradient; sqrt(8 / 2) for its shape
    torch.testing.assert_close(weight.detach(), before * 0.95 - 0.1 * 2 * orthogonalised(weight.grad))


@pytest.mark.parametrize("tied", [True, False])
def test_it_has_the_matrices_of_recurrence_and_projections_and_nothing_else(tied):
    model = LanguageModel(
        11, embedding_size=4, hidden_size=6, num_layers=2, bidirectional=True, tie_weights=tied, ngram_embeddings=[2]
    )
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0, "muon_lr_scale": 3.0, "ngram_lr_scale": 0.5}
    muon, adamw, sparse = build_optimizers(model, name="muon", **settings)
    names = {id(weight): name for name, weight in model.named_parameters()}
    moved = [{names[id(w)] for group in each.param_groups for w in group["params"]} for each in (muon, adamw, sparse)]
    assert moved[0] == {
        name
        for name, weight in model.named_parameters()
        if name.startswith(("recurrence.", "projections.")) and weight.dim() == 2
    }
    assert len(moved[0]) > 8
    assert "embedding.weight" in moved[1]
    assert sorted(moved[0] | moved[1] | moved[2]) == sorted(names.values())
    assert sum(map(len, moved)) == len(names)
    set_learning_rate([muon, adamw, sparse], 0.02)
    assert [each.param_groups[0]["lr"] for each in (muon, adamw, sparse)] == pytest.approx([0.06, 0.02, 0.01])


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_gate_learns_slowly_and_the_weights_of_recent_tokens_do_not(name):
    """Else the gate would be sure of the counts before the network has learnt anything."""
    model = LanguageModel(11, embedding_size=4, hidden_size=6, ngram_counts=3, recent_tokens=9)
    optimizers = build_optimizers(model, name=name, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    set_learning_rate(optimizers, 0.02)
    groups = [group for each in optimizers for group in each.param_groups]
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    slow = {name for name, weight in model.named_parameters() if rates[id(weight)] == pytest.approx(0.3 * 0.02)}
    assert slow == {
        f"mixtures.of_forward.{each}"
        for each in ("of_state.weight", "of_state.bias", "of_counts.weight", "weights.weight", "weights.bias")
    }


def test_a_model_learns_with_it():
    torch.manual_seed(3)
    model = LanguageModel(8, embedding_size=8, hidden_size=16)
    optimizers = build_optimizers(model, name="muon", lr=0.05, betas=(0.9, 0.99), weight_decay=0.01, muon_lr_scale=1.0)
    tokens, lengths = torch.tensor([[1, 4, 5, 6, 7, 4, 2], [1, 7, 6, 4, 5, 5, 2]]).t(), torch.tensor([7, 7])
    losses = []
    for _ in range(80):
        total = model.loss(tokens, lengths).total
        total.backward()
        optimizer_step(optimizers)
        losses.append(float(total.detach()))
    assert losses[-1] < 0.1 * losses[0]
