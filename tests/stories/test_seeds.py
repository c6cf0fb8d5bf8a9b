"""The facts that lmtrain grew out of, each a test named after its number."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lmtrain.data.batches.rows import make_batch
from lmtrain.model.cells import CELLS
from lmtrain.model.directions import RecurrentLayers
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import count_events
from lmtrain.model.packing import pack_rows
from lmtrain.model.recurrence import RecurrentStack
from lmtrain.system.device import choose_device
from lmtrain.training.optimization import clip_gradient
from tests.conftest import ROOT

SAMPLE = [[int(word) for word in line.split()] for line in (ROOT / "data/sample_ids.txt").read_text().splitlines()]
BATCH = make_batch(SAMPLE, pad_id=0)


def layers(cell="lstm", num_layers=1, bidirectional=False):
    torch.manual_seed(0)
    return RecurrentLayers(cell, 256, 512, num_layers, bidirectional)


@pytest.fixture(scope="module")
def packed():
    torch.manual_seed(1)
    embedded = nn.Embedding(100, 256)(BATCH.tokens).detach()  # (20, 10, 256)
    return pack_padded_sequence(embedded, BATCH.lengths)


def test_fact_1_padded_and_sorted():
    assert BATCH.tokens.shape == (20, 10)
    assert BATCH.lengths.tolist() == [20, 18, 18, 17, 15, 10, 8, 6, 6, 5]
    assert BATCH.tokens[0].tolist() == [85, 58, 87, 22, 70, 19, 93, 94, 80, 62]
    for column, row in enumerate(BATCH.order.tolist()):
        length = len(SAMPLE[row])
        assert BATCH.tokens[:length, column].tolist() == SAMPLE[row]
        assert not BATCH.tokens[length:, column].any()


def test_fact_2_packed():
    rows = pack_rows(BATCH.lengths)
    assert len(rows.time) == 123
    assert rows.batch_sizes == [10, 10, 10, 10, 10, 9, 7, 7, 6, 6, 5, 5, 5, 5, 5, 4, 4, 3, 1, 1]
    wanted = pack_padded_sequence(BATCH.tokens, BATCH.lengths)
    assert torch.equal(BATCH.tokens[rows.time, rows.row], wanted.data)
    assert rows.batch_sizes == wanted.batch_sizes.tolist()


def test_fact_3_lstm_shapes(packed):
    output, (h_n, c_n) = layers()(packed)
    assert output.data.shape == (123, 512)
    assert h_n.shape == c_n.shape == (1, 10, 512)
    padded, lengths = pad_packed_sequence(output)
    assert padded.shape == (20, 10, 512)
    assert lengths.tolist() == BATCH.lengths.tolist()


def test_fact_4_gru_has_no_cell_state(packed):
    output, state = layers("gru")(packed)
    assert output.data.shape == (123, 512)
    assert [part.shape for part in state] == [(1, 10, 512)]


def test_fact_5_two_layers_two_directions(packed):
    output, (h_n, _) = layers(num_layers=2, bidirectional=True)(packed)
    assert pad_packed_sequence(output)[0].shape == (20, 10, 1024)
    assert h_n.shape == (4, 10, 512)
    assert h_n.view(2, 2, 10, 512).shape == (2, 2, 10, 512)


def test_fact_6_greedy_steps():
    torch.manual_seed(2)
    model = LanguageModel(100, embedding_size=16, hidden_size=16).eval()
    tokens, state = BATCH.tokens[:1], None
    with torch.no_grad():
        for _ in range(int(BATCH.lengths[0])):
            logits, state = model(tokens, state)
            assert logits.shape == (1, 10, 100)
            tokens = logits.argmax(-1)
    # that a row stops at its end token: tests/inference/test_generation.py


def test_fact_7_second_sample():
    rows = [[12, 23, 1, 16, 59, 6, 37], [6, 3, 2, 76, 31], [12, 6, 1], [11, 21, 18, 1]]
    batch = make_batch(rows, pad_id=0)
    assert batch.lengths.tolist() == [7, 5, 4, 3]
    assert batch.order.tolist() == [0, 1, 3, 2]


def test_fact_8_output_against_h_n(packed):
    output, (h_n, _) = layers(num_layers=2, bidirectional=True)(packed)
    output, lengths = pad_packed_sequence(output)
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(output[0, b, 512:], h_n[-1, b])
        assert torch.equal(output[length - 1, b, :512], h_n[-2, b])
        assert torch.equal(output[-1, b, :512], h_n[-2, b]) == (length == 20)


def test_fact_9_h_n_runs_layer_by_layer(packed):
    both = layers(num_layers=2, bidirectional=True)
    _, (h_n, _) = both(packed)
    rows = pack_rows(BATCH.lengths)
    _, forward = both.stacks[0](packed.data, rows)
    _, backward = both.stacks[1](packed.data[rows.reversed()], rows)
    assert torch.equal(h_n[::2], torch.stack([h for h, _ in forward]))
    assert torch.equal(h_n[1::2], torch.stack([h for h, _ in backward]))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_fact_10_no_initial_state_is_zeros(cell, packed):
    model = layers(cell, 2, True).double()
    inputs = packed.to(dtype=torch.float64)
    zeros = tuple(torch.zeros(4, 10, 512, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1))
    (output, state), (wanted, wanted_state) = model(inputs), model(inputs, zeros)
    assert output.data.dtype == torch.float64
    assert torch.equal(output.data, wanted.data)
    assert all(map(torch.equal, state, wanted_state))


def test_fact_11_wrong_shapes_are_refused_in_words(packed):
    model = layers(num_layers=2, bidirectional=True)
    with pytest.raises(ValueError, match="3 dimensions"):
        model(torch.zeros(4, 256))
    with pytest.raises(ValueError, match="2 dimensions"):
        model(packed._replace(data=torch.zeros(123, 256, 1)))
    with pytest.raises(ValueError, match=r"last size is 255.*input size 256"):
        model(torch.zeros(4, 2, 255))
    with pytest.raises(ValueError, match=r"\(4, 10, 512\), not \(2, 10, 512\)"):
        model(packed, (torch.zeros(2, 10, 512), torch.zeros(2, 10, 512)))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_fact_12_rows_do_not_touch_each_other(cell, packed):
    model = layers(cell, 2, True)
    together, lengths = pad_packed_sequence(model(packed)[0])
    padded, _ = pad_packed_sequence(packed)
    for b, length in enumerate(lengths.tolist()):
        alone, _ = model(padded[:length, b : b + 1])
        torch.testing.assert_close(
            together[:length, b : b + 1], alone, rtol=1e-5, atol=1e-5
        )  # a product of one row sums in another order


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_fact_13_packed_and_padded_agree_on_real_tokens(cell, packed):
    model = layers(cell, 2)  # padding stands behind a row, where only the forward direction may ignore it
    output, lengths = pad_packed_sequence(model(packed)[0])
    padded, _ = model(pad_packed_sequence(packed)[0])
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(output[:length, b], padded[:length, b], rtol=1e-5, atol=1e-6)


def test_fact_14_device():
    device = choose_device("auto")
    assert device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = LanguageModel(100, embedding_size=8, hidden_size=8, bidirectional=True).to(device)
    losses = model.loss(BATCH.tokens.to(device), BATCH.lengths)
    assert {nats.device for nats in losses.nats.values()} == {device}


def hand_written(cell, x, state, w_ih, w_hh, b_ih, b_hh):
    """One step of the equations as they are written down."""
    s, tanh = torch.sigmoid, torch.tanh
    from_x, from_h = x @ w_ih.t() + b_ih, state[0] @ w_hh.t() + b_hh
    if cell == "rnn":
        return (tanh(from_x + from_h),)
    if cell == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, 1)
        c = s(f) * state[1] + s(i) * tanh(g)
        return s(o) * tanh(c), c
    x_r, x_z, x_n = from_x.chunk(3, 1)
    h_r, h_z, h_n = from_h.chunk(3, 1)
    r, z = s(x_r + h_r), s(x_z + h_z)
    return ((1 - z) * tanh(x_n + r * h_n) + z * state[0],)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_fact_15_cells_agree_with_their_equations(cell):
    """Against torch.nn, values and gradients: tests/model/test_recurrence.py."""
    torch.manual_seed(3)
    kernel, gates, names = CELLS[cell].kernel, CELLS[cell].gates, CELLS[cell].states
    weights = [torch.randn(gates * 5, size).double() for size in (4, 5)] + [torch.randn(gates * 5).double()] * 2
    x, state = torch.randn(3, 4).double(), tuple(torch.randn(3, 5).double() for _ in names)
    _, *ours = kernel.apply(x, *state, *weights, pack_rows(torch.ones(3, dtype=torch.int64)))
    torch.testing.assert_close(tuple(ours), hand_written(cell, x, state, *weights))


def test_fact_15_worked_example_of_the_cell_path():
    """C' = [3, 5, -2] and f = [0.7, 0.4, 0.8] give f*C' = [2.1, 2.0, -1.6] where the input gate is shut."""
    bias = torch.zeros(4, 3, dtype=torch.float64)
    bias[0] = -1e9  # i = 0
    bias[1] = torch.logit(torch.tensor([0.7, 0.4, 0.8], dtype=torch.float64))
    zeros = torch.zeros(12, 3, dtype=torch.float64)
    cell = torch.tensor([[3.0, 5.0, -2.0]], dtype=torch.float64)
    rows = pack_rows(torch.tensor([1]))
    _, _, c_n = CELLS["lstm"].kernel.apply(
        zeros[:1], zeros[:1], cell, zeros, zeros, bias.flatten(), bias.flatten() * 0, rows
    )
    torch.testing.assert_close(c_n, torch.tensor([[2.1, 2.0, -1.6]], dtype=torch.float64))


def gradient_over(steps, cell, gain):
    """Norm of d h_T / d h_0 (and c_0) for zero inputs, recurrent weights `gain` times orthogonal."""
    torch.manual_seed(4)
    stack = RecurrentStack(cell, 2, [16])
    with torch.no_grad():
        stack.layers[0].weight_hh_l0.mul_(gain)
        if cell == "lstm":
            stack.layers[0].bias_ih_l0[16:32] = 6.0  # a forget gate that has learnt to stay open
    parts = 2 if cell == "lstm" else 1
    state = tuple(torch.full((1, 16), 1e-3, requires_grad=True) for _ in range(parts))
    _, (last,) = stack(torch.zeros(steps, 2), pack_rows(torch.tensor([steps])), (state,))
    last[-1].sum().backward()  # the cell where there is one, else the hidden state
    return float(state[-1].grad.norm())


def test_fact_16_why_gates():
    assert gradient_over(60, "rnn", 0.7) < 1e-6 * gradient_over(1, "rnn", 0.7)  # fades
    assert gradient_over(12, "rnn", 1.8) > 100 * gradient_over(1, "rnn", 1.8)  # explodes
    assert gradient_over(60, "lstm", 0.7) > 0.5 * gradient_over(1, "lstm", 0.7)  # kept by the cell path


def test_fact_17_settings_against_vanishing_and_exploding():
    """Clipping bounds the step; the open forget gate keeps more of the past than a shut one does."""
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 50.0)
    assert clip_gradient([weight], 1.0) == 100.0
    assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)
    weight.grad = torch.full((4,), 50.0)
    assert clip_gradient([weight], None) == 100.0
    assert float(weight.grad.norm()) == 100.0
    kept = {}
    for forget_bias in (0.0, 1.0):
        stack = RecurrentStack("lstm", 2, [16])
        with torch.no_grad():
            stack.layers[0].bias_ih_l0[16:32] = forget_bias
        state = (torch.zeros(1, 16), torch.ones(1, 16))
        _, ((_, c_n),) = stack(torch.zeros(10, 2), pack_rows(torch.tensor([10])), (state,))
        kept[forget_bias] = float(c_n.detach().abs().sum())
    assert kept[1.0] > 2 * kept[0.0]


def test_fact_18_two_stacks_fill_what_one_can_not():
    """The blank follows from what stands behind it: `x A` or `y B`, the first word is decided by the second."""
    torch.manual_seed(5)
    model = LanguageModel(8, embedding_size=8, hidden_size=8, bidirectional=True)
    rows = [[1, 4, 6, 2], [1, 5, 7, 2]] * 2
    batch = make_batch(rows, pad_id=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    events = count_events(len(batch.lengths), int(batch.lengths.sum()))
    weights = {name: 1 / count for name, count in events.items()}
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(batch.tokens, batch.lengths, weights).total.backward()
        optimizer.step()
    with torch.no_grad():
        nats = model.eval().loss(batch.tokens, batch.lengths).nats
        first = {name: nats[name] / events[name] for name in nats}
    assert float(first["fill"]) < 0.1
    assert float(first["forward"]) > 0.9 * torch.log(torch.tensor(2.0)) / 3  # the first of three words is a coin's toss
    own = {id(parameter) for parameter in model.recurrence.stacks[0].parameters()}
    assert not own & {id(parameter) for parameter in model.recurrence.stacks[1].parameters()}
