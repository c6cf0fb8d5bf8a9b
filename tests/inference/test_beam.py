"""Beam search: one beam is greedy, and a beam as wide as the tree finds what enumeration finds."""

import itertools
import tracemalloc

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.inference.beam import beam_search
from lmtrain.inference.generation import generate
from lmtrain.inference.options import Beams
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import select
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
    monkeypatch.setattr("lmtrain.inference.generation.ROWS_AT_ONCE", 3 * width)  # several batches, too
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


def plain_search(model, codec, prompts, max_tokens, width):
    """Texts (ids, log-probabilities, ended) to each prompt, most probable first; candidates are tuples in lists."""
    batch = make_batch([codec.encode(text) for text in prompts], codec.tokenizer.pad_id)
    ended = [[] for _ in prompts]
    running = [(prompt, [], [], 0.0) for prompt in batch.order.tolist()]
    logits, state = model.read_prompts(batch.tokens, batch.lengths, codec.direction)
    for step in range(max_tokens):
        log_probabilities = logits.log_softmax(-1)
        log_probabilities[:, codec.excluded_ids] = -torch.inf
        best = log_probabilities.topk(min(width, logits.shape[1]), dim=1)
        candidates = {}
        for parent, (values, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            prompt, _, _, total = running[parent]
            extended = [(total + value, parent, token, value) for value, token in zip(values, ids, strict=True)]
            candidates.setdefault(prompt, []).extend(each for each in extended if each[3] > -torch.inf)
        parents, after = [], []
        for prompt, of_prompt in candidates.items():
            of_prompt.sort(key=lambda each: -each[0])
            for total, parent, token, value in of_prompt[: width - len(ended[prompt])]:
                _, ids, values, _ = running[parent]
                if token == codec.end:
                    ended[prompt].append((ids, [*values, value], True))
                else:
                    parents.append(parent)
                    after.append((prompt, [*ids, token], [*values, value], total))
        running = after
        if not running or step == max_tokens - 1:
            break
        tokens = torch.tensor([ids[-1] for _, ids, _, _ in running])
        logits, state = model(tokens.unsqueeze(0), select(state, torch.tensor(parents)), codec.direction)
        logits = logits.squeeze(0)
    for prompt, ids, values, _ in running:
        ended[prompt].append((ids, values, False))
    return [sorted(texts, key=lambda text: sum(text[1]), reverse=True) for texts in ended]


def model_of_ties(tokenizer, seed):
    """Its logits are one of three numbers, whatever it has read."""
    model = untrained_model(tokenizer, seed, tie_weights=False, bidirectional=True)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.randint(0, 3, model.output.bias.shape))
    return model


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("make", [untrained_model, model_of_ties])
def test_it_finds_what_a_plain_search_finds_to_the_last_bit(make, direction, stream, monkeypatch):
    codec = PromptCodec(IDS, stream, direction)
    for seed, width in enumerate([1, 2, 3, 7, 40]):
        model = make(IDS, seed, **({} if make is model_of_ties else {"bidirectional": True}))
        monkeypatch.setattr("lmtrain.inference.generation.ROWS_AT_ONCE", 8 * width)
        with torch.inference_mode():
            wanted = plain_search(model, codec, PROMPTS, 6, width)
        # fewer texts than the width are found where all of them have ended
        count = min(map(len, wanted))
        found = beam_search(model, codec, PROMPTS, max_tokens=6, beams=Beams(width), count=count)
        flat = [text for texts in wanted for text in texts[:count]]
        assert [each.finished for each in found] == [ended for _, _, ended in flat]
        assert [[value for _, value in each.tokens] for each in found] == [values for _, values, _ in flat]
        names = [[codec.name(token) for token in ids] for ids, _, _ in flat]
        assert [[name for name, _ in each.tokens[: len(ids)]] for each, ids in zip(found, names, strict=True)] == names


def test_a_wide_search_reads_its_texts_in_blocks(monkeypatch):
    codec, sizes, forward = PromptCodec(IDS), [], LanguageModel.forward

    def watched(model, *inputs):
        logits, state = forward(model, *inputs)
        sizes.append(logits.numel())
        return logits, state

    for model in (untrained_model(IDS, 3), untrained_model(IDS, 3, ngram_embeddings=[2, 3]), model_of_ties(IDS, 3)):
        whole = beam_search(model, codec, PROMPTS, max_tokens=6, beams=Beams(60), count=50)
        with monkeypatch.context() as patch:
            patch.setattr("lmtrain.inference.beam.LOGITS_AT_ONCE", 200)
            patch.setattr("lmtrain.inference.generation.LOGITS_AT_ONCE", 200)
            patch.setattr(LanguageModel, "forward", watched)
            blocks = beam_search(model, codec, PROMPTS, max_tokens=6, beams=Beams(60), count=50)
        assert [each.text for each in blocks] == [each.text for each in whole]
        assert [each.log_probability for each in blocks] == pytest.approx([each.log_probability for each in whole])
    assert 0 < max(sizes) <= 200


def test_a_wide_search_takes_no_python_object_for_each_of_its_candidates():
    wide = IdsTokenizer(600, 0)
    model = untrained_model(wide)
    tracemalloc.start()
    beam_search(model, PromptCodec(wide), ["1"], max_tokens=3, beams=Beams(500))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 500 * 500 * 100
