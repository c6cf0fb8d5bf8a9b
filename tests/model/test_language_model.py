"""The model: no logit depends on what it must not see, and the loss is the sum over single rows."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.batches.rows import make_batch
from lmtrain.model.cells import CELLS
from lmtrain.model.dropout import drop
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import align, count_events

VOCABULARY = 11
BOS, EOS = 1, 2


def model_of(cell="lstm", num_layers=2, bidirectional=True, **more):
    torch.manual_seed(5)
    settings = {"embedding_size": 5, "hidden_size": 6, "dropout": 0.0} | more
    return LanguageModel(VOCABULARY, cell=cell, num_layers=num_layers, bidirectional=bidirectional, **settings).eval()


def framed(*rows):
    return make_batch([[BOS, *row, EOS] for row in rows], pad_id=0)


def logits_by_place(model, batch):
    """The logits and the targets, each by (objective, column, predicted place)."""
    places = align(batch.lengths)
    time, row = places.rows.time.tolist(), places.rows.row.tolist()
    length = places.rows.lengths.tolist()  # events a row, the place of its <eos>
    inner = places.fill_forward.tolist()
    where = {
        "forward": [(b, t + 1) for t, b in zip(time, row, strict=True)],
        "backward": [(b, length[b] - 1 - t) for t, b in zip(time, row, strict=True)],
        "fill": [(row[k], time[k] + 1) for k in inner],
    }
    with torch.no_grad():
        events = model.read(batch.tokens.to(model.embedding.weight.device), batch.lengths).events
        return {
            (objective, *place): logits
            for objective, part in events.items()
            for place, logits in zip(where[objective], model.output(part.states).cpu(), strict=True)
        }, {
            (objective, *place): int(target)
            for objective, part in events.items()
            for place, target in zip(where[objective], part.targets, strict=True)
        }


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("backend", ["packed", "torch", "n-grams", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_changed_token_changes_no_logit_that_must_not_depend_on_it(cell, num_layers, backend):
    on_cuda, more = backend == "cuda", {"backend": backend}
    if backend == "n-grams":
        more = {"ngram_embeddings": [2, 3], "ngram_embedding_buckets": 1000, "layer_norm": True}
    model = model_of(cell, num_layers).cuda() if on_cuda else model_of(cell, num_layers, **more)
    for vectors in model.ngram_embeddings.parameters():
        torch.nn.init.uniform_(vectors)
    rows = [[3, 4, 5, 6, 7, 8], [9, 10, 3], [5]]
    before, targets = logits_by_place(model, framed(*rows))
    lengths = [len(row) for row in rows]
    seen = 0
    for column, row in enumerate(rows):
        for place in range(1, len(row) + 1):  # place 0 is <bos>
            changed = [list(each) for each in rows]
            changed[column][place - 1] = 3 + (row[place - 1] - 2) % 8
            after, _ = logits_by_place(model, framed(*changed))
            for (objective, b, predicted), logits in after.items():
                sees = (
                    b == column
                    and {
                        "forward": place < predicted,
                        "backward": place > predicted,
                        "fill": place != predicted,
                    }[objective]
                )
                same = torch.equal(logits, before[objective, b, predicted])
                assert same != sees, (objective, b, predicted, column, place)
                seen += sees
    assert seen > 50
    for (_, b, predicted), target in targets.items():
        whole = [BOS, *rows[b], EOS]
        assert target == whole[predicted]
    assert {place for objective, b, place in targets if objective == "forward" and b == 0} == set(
        range(1, lengths[0] + 2)
    )
    assert {place for objective, b, place in targets if objective == "backward" and b == 0} == set(
        range(lengths[0] + 1)
    )
    assert {place for objective, b, place in targets if objective == "fill" and b == 0} == set(range(1, lengths[0] + 1))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("output", ["full", "adaptive"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@settings(max_examples=12)
@given(
    rows=st.lists(st.lists(st.integers(3, 10), max_size=7), min_size=1, max_size=6),
    backend=st.sampled_from(["packed", "torch"]),
    chance=st.randoms(),
)
def test_packed_loss_is_the_sum_over_single_rows(cell, output, bidirectional, rows, backend, chance):
    model = model_of(cell, bidirectional=bidirectional, output=output, tie_weights=output == "full", backend=backend)
    model.double()
    batch = framed(*rows)
    together = model.loss(*batch[:2]).nats
    alone = [model.loss(*framed(row)[:2]).nats for row in rows]
    assert set(together) == ({"forward", "backward", "fill"} if bidirectional else {"forward"})
    for objective, nats in together.items():
        total = sum(float(each[objective]) for each in alone)
        assert float(nats) == pytest.approx(total, rel=1e-5)
    events = count_events(len(batch.lengths), int(batch.lengths.sum()))
    for objective, part in model.read(*batch[:2]).events.items():
        assert len(part.states) == len(part.targets) == events[objective]
    shuffled = framed(*chance.sample(rows, len(rows)))
    places = torch.arange(len(shuffled.tokens))[:, None]
    shuffled.tokens[places >= shuffled.lengths] = chance.randrange(VOCABULARY)  # whatever the padding
    for objective, nats in model.loss(*shuffled[:2]).nats.items():
        assert float(nats) == pytest.approx(float(together[objective]), rel=1e-9)


def test_padding_does_not_change_a_row():
    model = model_of()
    alone, _ = logits_by_place(model, framed([3, 4]))
    beside, _ = logits_by_place(model, framed([3, 4], [5, 6, 7, 8, 9]))
    for (objective, _, place), logits in alone.items():
        torch.testing.assert_close(beside[objective, 1, place], logits)


@pytest.mark.parametrize(
    ("more", "shared"), [({}, True), ({"embedding_size": 6}, True), ({"tie_weights": False}, False)]
)
def test_tied_weights_are_one_tensor(more, shared):
    model = model_of(**more)
    assert (model.output.weight is model.embedding.weight) == shared
    assert sum(name in ("output.weight", "embedding.weight") for name, _ in model.named_parameters()) == 2 - shared


@pytest.mark.parametrize("output", ["full", "adaptive"])
def test_probabilities_sum_to_one_and_agree_with_the_loss(output):
    model = model_of(output=output, tie_weights=output == "full")
    with torch.no_grad():
        events = model.read(*framed([3, 4, 5])[:2]).events["forward"]
        log_probabilities = model.output.log_probabilities(events.states)
        torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(4))
        wanted = -log_probabilities.gather(1, events.targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(model.nats("forward", events), wanted)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_reading_on_step_by_step_equals_reading_at_once(cell):
    model = model_of(cell, bidirectional=False)
    tokens = torch.tensor([[1, 1], [3, 4], [5, 6]])
    with torch.no_grad():
        whole, last = model(tokens)
        state = None
        for step in tokens:
            logits, state = model(step.unsqueeze(0), state)
        prompts, prompt_state = model.read_prompts(tokens, torch.tensor([3, 3]))
    torch.testing.assert_close(logits[0], whole[-1])
    torch.testing.assert_close(prompts, whole[-1])
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(prompt_state, last)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_dropout_zeroes_its_fraction_and_keeps_the_mean(fraction):
    torch.manual_seed(6)
    values = torch.full((301, 333), 2.0, requires_grad=True)  # of no round number
    dropped = drop(values, fraction, training=True)
    zeros = float((dropped == 0).double().mean())
    assert zeros == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / values.numel()) ** 0.5)
    kept = dropped[dropped != 0].detach()
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - fraction)), rtol=0.01, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    torch.testing.assert_close(gradient, dropped.detach() / 2)
    torch.manual_seed(6)
    assert drop(values, fraction, training=True).equal(dropped)
    assert drop(values, fraction, training=True).equal(dropped) == (fraction == 0)
    assert drop(values, fraction, training=False) is values


def test_dropout_chooses_neighbours_and_columns_independently():
    torch.manual_seed(7)
    zero = (drop(torch.ones(4096, 64), 0.5, training=True) == 0).double()
    for other in (zero.roll(1, 1), zero.roll(4, 1), zero.roll(1, 0)):
        assert float((zero * other).mean()) == pytest.approx(0.25, abs=0.005)
    assert float((zero.mean(0) - 0.5).abs().max()) < 0.04


ON_CUDA = [
    *({"cell": cell, "backend": backend} for cell in CELLS for backend in ("packed", "torch")),
    {"tie_weights": False},
    {"tie_weights": False, "output": "adaptive"},
    {"layer_norm": True, "residual": True},
    {"ngram_embeddings": [2, 3], "ngram_embedding_buckets": 1000},
]


@pytest.mark.cuda
@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", ON_CUDA, ids=str)
def test_loss_and_gradients_on_cuda_equal_those_on_cpu(more, training):
    """In evaluation mode, too, as dynamic evaluation needs them: cuDNN has a backward pass in training mode only."""
    results = []
    for device in ("cpu", "cuda"):
        model = model_of(**more).to(device).train(training)  # without dropout
        for vectors in model.ngram_embeddings.parameters():
            torch.nn.init.constant_(vectors, 0.1)
        tokens, lengths, _ = framed([3, 4, 5, 6], [7, 8], [9])
        losses = model.loss(tokens.to(device), lengths, {"forward": 0.5, "backward": 0.3, "fill": 1.0})
        losses.total.backward()
        gradients = [parameter.grad.to_dense().cpu() for parameter in model.parameters()]
        results.append([losses.total.detach().cpu(), *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_a_model_can_be_sent_to_another_process(cell):
    """The library writes no pickle, but a program that uses it may start processes."""
    model = model_of(cell)
    other = pickle.loads(pickle.dumps(model))  # noqa: S301  # its own
    tokens = torch.tensor([[BOS], [3]])
    assert torch.equal(other(tokens)[0], model(tokens)[0])
