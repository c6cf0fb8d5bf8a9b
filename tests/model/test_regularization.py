"""Each regulariser does what its name says, and nothing at all where it is off."""

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.model.dropout import drop_locked, drop_tokens
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.packing import pack_rows
from lmtrain.model.recurrence import RecurrentStack

ROWS = pack_rows(torch.tensor([9, 9, 6, 2]))
EQUAL = pack_rows(torch.tensor([5, 5, 5]))
OFF = dict.fromkeys(
    [
        "input_dropout",
        "layer_dropout",
        "output_dropout",
        "embedding_dropout",
        "weight_dropout",
        "ngram_embedding_dropout",
        "activation_penalty",
        "temporal_penalty",
        "label_smoothing",
    ],
    0.0,
)


def model_of(**more):
    torch.manual_seed(7)
    settings = {"embedding_size": 8, "hidden_size": 8, "num_layers": 2, "dropout": 0.0} | more
    return LanguageModel(20, **settings)


def batch():
    return make_batch([[1, 4, 5, 6, 7, 2], [1, 8, 9, 2], [1, 4, 2]], 0)


def loss_and_gradients(model, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    tokens, lengths, _ = batch()
    total = model.loss(tokens, lengths).total
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_off_is_bit_identical_to_not_there(bidirectional):
    plain, off = (model_of(bidirectional=bidirectional, dropout=0.3, **more) for more in ({}, OFF))
    for ours, theirs in zip(loss_and_gradients(off), loss_and_gradients(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OFF)
def test_on_changes_training_and_not_evaluation(name):
    ngrams = [2] if name == "ngram_embedding_dropout" else []
    plain, on = model_of(ngram_embeddings=ngrams), model_of(ngram_embeddings=ngrams, **{name: 0.4})
    for vectors in (*plain.ngram_embeddings.parameters(), *on.ngram_embeddings.parameters()):
        torch.nn.init.ones_(vectors)
    assert not torch.equal(loss_and_gradients(plain)[0], loss_and_gradients(on)[0])
    assert torch.equal(loss_and_gradients(plain.eval())[0], loss_and_gradients(on.eval())[0])


@pytest.mark.parametrize("rows", [ROWS, EQUAL], ids=["ragged", "equal"])
def test_a_locked_mask_is_one_a_row(rows):
    torch.manual_seed(1)
    dropped = drop_locked(torch.ones(len(rows.time), 40), rows, 0.4, training=True)
    masks = [dropped[rows.row == row] for row in range(len(rows.lengths))]
    for mask in masks:
        assert torch.equal(mask, mask[:1].expand_as(mask))  # the same at each step
        assert all(value in (0.0, pytest.approx(1 / 0.6, rel=1e-4)) for value in mask.unique().tolist())
    assert len({tuple(mask[0].tolist()) for mask in masks}) == len(masks)  # and another in each row


def test_a_locked_mask_keeps_the_mean():
    torch.manual_seed(2)
    rows = pack_rows(torch.tensor([2] * 500))
    assert float(drop_locked(torch.ones(1000, 64), rows, 0.3, training=True).mean()) == pytest.approx(1, abs=0.02)


def test_a_dropped_word_is_dropped_wherever_it_stands():
    torch.manual_seed(3)
    tokens = torch.randint(0, 50, (400,))
    dropped = drop_tokens(torch.ones(400, 6), tokens, 50, 0.5, training=True)
    for token in tokens.unique():
        assert len(dropped[tokens == token].unique()) == 1
    zeroed = sum(not dropped[tokens == token].any() for token in tokens.unique())
    assert 12 < zeroed < 38


@pytest.mark.parametrize("backend", ["packed", "torch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_weight_drop_zeroes_connections_and_leaves_the_raw_weight(cell, backend):
    torch.manual_seed(4)
    stack = RecurrentStack(cell, 5, [6], backend=backend, weight_dropout=0.5)
    raw = stack.layers[0].weight_hh_l0
    before = raw.detach().clone()
    inputs = torch.randn(len(ROWS.time), 5)
    output, _ = stack(inputs, ROWS)
    output.square().sum().backward()
    assert torch.equal(raw, before)  # what the optimizer steps from is whole
    assert [name for name, _ in stack.named_parameters()] == [
        f"layers.0.{n}" for n, _ in stack.layers[0].named_parameters()
    ]
    dropped = raw.grad == 0
    assert 0.25 < float(dropped.float().mean()) < 0.75
    with torch.no_grad():  # the dropped weights alone make the output: a plain stack with these zeroed agrees
        plain = RecurrentStack(cell, 5, [6], backend=backend)
        plain.load_state_dict(stack.state_dict())
        plain.layers[0].weight_hh_l0.mul_(~dropped * 2)
        torch.testing.assert_close(plain(inputs, ROWS)[0], output)
        assert not torch.equal(stack.eval()(inputs, ROWS)[0], output)


@pytest.mark.parametrize("rows", [ROWS, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_both_backends_agree_under_weight_drop(cell, rows):
    results = []
    for backend in ("packed", "torch"):
        torch.manual_seed(5)
        stack = RecurrentStack(cell, 5, [6, 4], backend=backend, weight_dropout=0.4, layer_norm=True).double()
        inputs = torch.randn(len(rows.time), 5).double()
        torch.manual_seed(6)
        output, _ = stack(inputs, rows)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in stack.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_penalties_are_the_formula():
    """alpha mean(h**2) + beta mean((h_t - h_{t-1})**2), summed over tokens, by a loop over rows and steps."""
    alpha, beta = 2.0, 3.0
    plain, model = (model_of(**more).double() for more in ({}, {"activation_penalty": alpha, "temporal_penalty": beta}))
    tokens, lengths, _ = batch()
    wanted = 0.0
    with torch.no_grad():
        for row, length in enumerate(lengths.tolist()):
            alone = model.read(tokens[:length, row : row + 1], lengths[row : row + 1])
            h = alone.events["forward"].states
            wanted += alpha * float(h.square().mean(1).sum()) + beta * float((h[1:] - h[:-1]).square().mean(1).sum())
        more = model.loss(tokens, lengths, {"forward": 0.5}).total - plain.loss(tokens, lengths, {"forward": 0.5}).total
    assert float(more) == pytest.approx(0.5 * wanted, rel=1e-5)


def test_layers_differ_in_size_and_tying_bridges_it():
    model = model_of(layer_sizes=[12, 10, 6], bidirectional=True)
    shapes = [tuple(layer.weight_hh_l0.shape) for layer in model.recurrence.stacks[1].layers]
    assert shapes == [(48, 12), (40, 10), (24, 6)]
    assert model.projections["of_forward"].weight.shape == (8, 6)
    assert model.output.weight is model.embedding.weight
    assert all(torch.isfinite(each).all() for each in loss_and_gradients(model))
    with pytest.raises(ValueError, match="no state of one shape"):
        model.recurrence(torch.randn(3, 2, 8))


def test_the_awd_shape_needs_no_projection():
    model = model_of(layer_sizes=[12, 8])
    assert not list(model.projections.parameters())


@pytest.mark.parametrize("step", [False, True])
def test_residual_adds_the_input_and_layer_norm_normalises(step):
    torch.manual_seed(8)
    inputs, rows = torch.randn(6, 5), pack_rows(torch.tensor([1] * 6))

    def run(**more):
        torch.manual_seed(9)
        stack = RecurrentStack("gru", 5, [5], **more)
        return (stack.step(inputs) if step else stack(inputs, rows))[0]

    plain = run()
    torch.testing.assert_close(run(residual=True), plain + inputs)
    normed = run(layer_norm=True)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(plain, (5,)))
    torch.testing.assert_close(run(layer_norm=True, residual=True), normed + inputs)


def test_locked_dropout_stands_at_its_three_places(monkeypatch):
    """Input, between layers, output: with everything dropped at one of them the model knows nothing of its input."""
    import lmtrain.model.language_model as language_model
    import lmtrain.model.recurrence as recurrence

    seen = []

    def noted(values, rows, share, training):
        seen.append((share, values.shape[1]))
        return values

    monkeypatch.setattr(language_model, "drop_locked", noted)
    monkeypatch.setattr(recurrence, "drop_locked", noted)
    model = model_of(layer_sizes=[12, 10, 6], input_dropout=0.1, layer_dropout=0.2, output_dropout=0.3)
    loss_and_gradients(model)
    assert seen == [(0.1, 8), (0.2, 12), (0.2, 10), (0.3, 6)]
