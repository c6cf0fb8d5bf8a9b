"""Beam search: one beam is greedy, and a beam as wide as the tree finds what enumeration finds."""

import itertools

import pytest
import torch

from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.inference.beam import beam_search
from lmtrain.inference.generation import generate
from lmtrain.inference.options import Beams
from lmtrain.inference.prompts import PromptCodec
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(5, 0)
PROMPTS = ["1 2 3", "", "4", "2 2 2 2", "3"]


def enumerated(model, prompt, max_tokens):
    """Every text of up to max_tokens tokens, ended or cut, with its log-probability: {(ids, ended): value}."""
    own = [token for token in range(IDS.vocab_size) if token not in (IDS.pad_id, IDS.bos_id, IDS.eos_id)]
    start, found = [IDS.bos_id, *IDS.encode(prompt)], {}
    for length in range(max_tokens + 1):
        for ids in itertools.product(own, repeat=length):
            ended = length < max_tokens
            whole = [*start, *ids, *([IDS.eos_id] if ended else [])]
            with torch.no_grad():
                log_probabilities = model(torch.tensor(whole[:-1]).unsqueeze(1))[0].squeeze(1).log_softmax(-1)
            each = log_probabilities.gather(1, torch.tensor(whole[1:]).unsqueeze(1))[len(start) - 1 :]
            found[ids, ended] = (float(each.sum()), len(each))
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_texts_there_are(penalty):
    for seed in range(3):
        model = untrained_model(IDS, seed)
        for prompt in PROMPTS[:3]:
            ranked = sorted(enumerated(model, prompt, 3).items(), key=lambda item: -item[1][0] / item[1][1] ** penalty)
            found = beam_search(model, PromptCodec(IDS), [prompt], max_tokens=3, beams=Beams(200, penalty), count=10)
            for result, ((ids, ended), (log_probability, _)) in zip(found, ranked, strict=False):
                assert (tuple(IDS.encode(result.completion)), result.finished) == (ids, ended)
                assert result.log_probability == pytest.approx(log_probability, rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_beam_is_greedy(direction):
    codec = PromptCodec(IDS, direction=direction)
    for seed in range(4):
        model = untrained_model(IDS, seed, bidirectional=True)
        greedy = generate(model, codec, PROMPTS, max_tokens=12)
        for beams in (Beams(1), Beams(1, 2.0)):
            found = beam_search(model, codec, PROMPTS, max_tokens=12, beams=beams)
            assert [each.text for each in found] == [each.text for each in greedy]
            assert [each.log_probability for each in found] == pytest.approx(
                [each.log_probability for each in greedy], rel=1e-4
            )


@pytest.mark.parametrize("width", [2, 5])
def test_a_batch_of_ragged_prompts_equals_one_at_a_time(width, monkeypatch):
    monkeypatch.setattr("lmtrain.inference.beam.ROWS_AT_ONCE", 3 * width)  # several batches, too
    model, codec = untrained_model(IDS, 6), PromptCodec(IDS)
    together = beam_search(model, codec, PROMPTS, max_tokens=9, beams=Beams(width), count=2)
    alone = [
        each
        for text in PROMPTS
        for each in beam_search(model, codec, [text], max_tokens=9, beams=Beams(width), count=2)
    ]
    assert [(each.text, each.finished) for each in together] == [(each.text, each.finished) for each in alone]


def test_a_wider_beam_finds_more_probable_texts_than_greedy():
    model, codec = untrained_model(IDS, 8), PromptCodec(IDS)
    totals = [
        sum(each.log_probability for each in beam_search(model, codec, PROMPTS, max_tokens=6, beams=Beams(width)))
        for width in (1, 500)
    ]
    assert totals[0] + 0.1 < totals[1] < 0
