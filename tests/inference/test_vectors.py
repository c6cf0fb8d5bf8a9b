"""Lines as vectors: PyTorch's output and h_n, in the order of the lines, in bounded memory."""

import numpy as np
import pytest
import torch
from torch import nn

from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.trained_model import load
from lmtrain.inference.vectors import embed, save_vectors
from lmtrain.training.start import train
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(9, 0)
LINES = ["1 2 3", "", "4", "5 6 7 8 1 2", "8", "2 2 2 2 2"]


def embedded(model, lines=LINES):
    (found,) = embed(model, PromptCodec(IDS), [Block("lines", range(1, 1 + len(lines)), lines)])
    return found


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_vectors_of_a_batch_equal_those_of_torch_nn_for_each_line(cell, bidirectional, monkeypatch):
    monkeypatch.setattr("lmtrain.inference.vectors.READ_TOKENS", 9)  # several batches
    model = untrained_model(IDS, 1, cell=cell, bidirectional=bidirectional)
    found = embedded(model)
    size, start = 16, 0
    assert found.output.shape == (16, size * (1 + bidirectional))
    assert found.h_n.shape == (len(LINES), 2 * (1 + bidirectional), size)
    for number, line in enumerate(LINES):
        ids = IDS.encode(line)
        end = start + len(ids)
        assert found.ids[start:end].tolist() == ids
        assert found.lengths[number] == len(ids)
        for place, stack in enumerate(model.recurrence.stacks):
            read = [IDS.bos_id, *ids] if place == 0 else [IDS.eos_id, *ids[::-1]]
            states, lasts = model.embedding(torch.tensor(read)), []
            for layer in stack.layers:
                assert isinstance(layer, (nn.LSTM, nn.GRU, nn.RNN))
                states, _ = layer(states)
                lasts.append(states[-1])
            wanted = states[1:] if place == 0 else states[1:].flip(0)
            own = torch.from_numpy(found.output[start:end, place * size : (place + 1) * size])
            torch.testing.assert_close(own, wanted)
            for number_of_layer, last in enumerate(lasts):
                row = found.h_n[number, number_of_layer * (1 + bidirectional) + place]
                torch.testing.assert_close(torch.from_numpy(row), last)
        start = end


def test_output_equals_h_n_at_the_ends_of_a_line():
    """SEEDS.md, fact 8: the backward reading ends at the first token, the forward one at the last."""
    found, size, start = embedded(untrained_model(IDS, 2, bidirectional=True)), 16, 0
    for number, length in enumerate(found.lengths):
        if length:
            output = found.output[start : start + length]
            np.testing.assert_array_equal(output[0, size:], found.h_n[number, -1])
            np.testing.assert_array_equal(output[-1, :size], found.h_n[number, -2])
        start += length


def test_the_file_holds_all_lines_in_their_order(tmp_path, small):
    model = load(train(small("training.max_steps=3")).run)
    lines = ["a b", "", "c", "d e f g"] * 5
    assert model.embed(lines, tmp_path / "vectors.npz") == 20
    with np.load(tmp_path / "vectors.npz") as found:
        assert sorted(found) == ["h_n", "ids", "lengths", "output"]
        whole = {name: found[name] for name in found}
    assert whole["lengths"].tolist() == [2, 0, 1, 4] * 5
    assert whole["output"].shape == (35, 16)
    assert whole["h_n"].shape == (20, 4, 8)
    blocks = [Block("lines", range(1, 8), lines[:7]), Block("lines", range(8, 1 + len(lines)), lines[7:])]
    assert save_vectors(tmp_path / "again.npz", embed(model.model, PromptCodec(model.tokenizer), blocks)) == 20
    with np.load(tmp_path / "again.npz") as found:
        for name, values in whole.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("lmtrain-*"))


def test_nothing_is_overwritten_and_nothing_is_left_of_a_fault(tmp_path):
    model, codec = untrained_model(IDS), PromptCodec(IDS)
    (tmp_path / "mine.npz").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine.npz: already exists"):
        save_vectors(tmp_path / "mine.npz", embed(model, codec, [Block("f", [1], ["1"])]))
    assert (tmp_path / "mine.npz").read_text() == "mine"
    with pytest.raises(DataError, match=r"f:2:1: 'x' is not an id"):
        save_vectors(tmp_path / "new.npz", embed(model, codec, [Block("f", [1, 2], ["1", "x"])]))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]
    uneven = untrained_model(IDS, layer_sizes=[8, 16])
    with pytest.raises(ConfigError, match=r"layers of the sizes \[8, 16\] have no h_n of one shape"):
        next(embed(uneven, codec, [Block("f", [1], ["1"])]))
