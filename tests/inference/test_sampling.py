"""Drawing tokens at random: the right distribution, within its bounds, the same for the same seed."""

import math

import pytest
import torch

from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.inference.generation import generate, stream
from lmtrain.inference.options import Sampling
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.sampling import Candidates, choose_candidates, draw_tokens, penalise, random_generator
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(9, 0)
DRAWN = 20_000


def token_probabilities(sampling, logits, seen=None):
    """The distribution over the whole vocabulary, (B, V) float64."""
    tokens, probabilities = choose_candidates(sampling, logits, seen)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, tokens, probabilities)


def test_what_is_drawn_is_distributed_as_the_model_has_it():
    """Chi-square over the vocabulary; one in a thousand sound samplers would fail, and the seed is fixed."""
    model = untrained_model(IDS, 1)
    results = generate(model, PromptCodec(IDS), ["3 1"], max_tokens=1, sampling=Sampling(), count=DRAWN)
    drawn = [result.tokens[0][0] for result in results]
    with torch.no_grad():
        logits, _ = model(torch.tensor([[IDS.bos_id], [3], [1]]))
    logits = logits[-1, 0]
    logits[[IDS.pad_id, IDS.bos_id]] = -math.inf
    wanted = (logits.softmax(-1) * DRAWN).tolist()
    names = [PromptCodec(IDS).name(token) for token in range(IDS.vocab_size)]
    terms = [(drawn.count(name) - want) ** 2 / want for name, want in zip(names, wanted, strict=True) if want > 5]
    assert sum(drawn.count(name) for name, want in zip(names, wanted, strict=True) if want == 0) == 0
    freedom = len(terms) - 1
    assert freedom >= 4
    assert sum(terms) < freedom + 3.1 * math.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_proportions(seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, 30) * 3
    logits[:, 0] = -math.inf
    plain = logits.double().softmax(-1)
    k, share, least = 1 + seed % 7, 0.1 + 0.04 * seed, 0.02 * seed
    for settings, inside in (
        (Sampling(top_k=k), lambda p: p >= p.sort(descending=True).values[k - 1]),
        (Sampling(top_p=share), None),
        (Sampling(min_p=least), lambda p: p >= least * p.max()),
    ):
        found = token_probabilities(settings, logits)
        torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
        for row, before in zip(found, plain, strict=True):
            kept = row > 0
            assert not kept[0]
            torch.testing.assert_close(row[kept], before[kept] / before[kept].sum())
            if inside is not None:
                assert torch.equal(kept, inside(before) & (before > 0))
                continue
            assert before[kept].sum() >= share - 1e-12  # together they hold the share, and without the least one not
            assert before[kept].sum() - before[kept].min() < share
            assert before[kept].min() >= before[~kept].max()


def plain_probabilities(sampling, logits):
    """Each setting over the whole vocabulary, in float64, in the words of `Sampling`."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        best, tokens = probabilities.topk(sampling.top_k)
        probabilities = torch.zeros_like(probabilities).scatter_(1, tokens, best)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(1, tokens, ordered)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least, 0.0)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return probabilities


@pytest.mark.parametrize("ties", [False, True])
def test_the_most_probable_are_taken_first_and_the_draws_are_those_from_the_whole_vocabulary(ties):
    chance = torch.Generator().manual_seed(7)
    for number in range(200):
        logits = 3 * torch.randn(20, 500, generator=chance)
        logits = logits.round() if ties else logits
        logits[:, 0] = -math.inf
        settings = Sampling(
            temperature=[1.0, 0.7, 0.05, 3.0][number % 4],
            top_k=[None, 1, 7, 40, 499][number % 5],
            top_p=[1.0, 0.9, 0.3][number % 3],
            min_p=[0.0, 0.05][number % 2],
        )
        plain, found = plain_probabilities(settings, logits), choose_candidates(settings, logits)
        if settings.top_k is None:
            assert torch.equal(found.probabilities, plain)
        else:
            assert found.probabilities.shape == (20, settings.top_k)
            torch.testing.assert_close(token_probabilities(settings, logits), plain, rtol=1e-12, atol=0)
        whole = Candidates(torch.arange(500).expand(20, 500), plain)
        draws = [
            draw_tokens(each, [random_generator(number, [row], 0) for row in range(20)]) for each in (whole, found)
        ]
        assert torch.equal(*draws)


@pytest.mark.parametrize("temperature", [1e-6, 1e-200, 1e-310, 5e-324])
def test_a_temperature_near_nothing_is_greedy(temperature):
    logits = torch.tensor([[3e38, -3e38, 1.0, -math.inf], [1e-38, 1.1e-38, -math.inf, 0.0], [-4.0, -4.0, 2.0, 2.0]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        found = token_probabilities(Sampling(temperature=temperature, **settings), logits)
        assert found[0].tolist() == [1, 0, 0, 0]
        assert temperature > 1e-100 or found[1].tolist() == [0, 1, 0, 0]
        assert set(found[2].tolist()) <= {0.0, 0.5, 1.0}
    model, codec = untrained_model(IDS, 4), PromptCodec(IDS)
    drawn = generate(model, codec, ["1", "2 2"], max_tokens=15, sampling=Sampling(temperature=temperature))
    assert drawn == generate(model, codec, ["1", "2 2"], max_tokens=15)


def test_a_high_temperature_still_takes_the_most_probable_first():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = token_probabilities(Sampling(temperature=1e300, top_k=2), logits)
    assert found.tolist() == [[0.0, 0.0, 0.5, 0.5]]


def test_memory_has_a_bound_whatever_the_vocabulary(monkeypatch):
    """Rows that are written together, and what of their logits becomes float64."""
    model, sizes = untrained_model(IDS, 4), []
    monkeypatch.setattr("lmtrain.inference.generation.LOGITS_AT_ONCE", 5 * IDS.vocab_size)

    def watched(logits, seen, penalty):
        sizes.append(logits.numel())
        return penalise(logits, seen, penalty)

    monkeypatch.setattr("lmtrain.inference.sampling.penalise", watched)
    results = generate(model, PromptCodec(IDS), ["1"] * 12, max_tokens=4, sampling=Sampling(top_k=3, seed=1))
    assert len(results) == 12
    assert max(sizes) == 5 * IDS.vocab_size
    assert choose_candidates(Sampling(top_k=3), torch.randn(2, 1000)).probabilities.shape == (2, 3)


def test_each_setting_takes_what_the_one_before_has_left():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    found = token_probabilities(Sampling(top_k=3, top_p=0.6), logits)  # of 0.526, 0.316, 0.158 the first two
    torch.testing.assert_close(found[0], torch.tensor([0.625, 0.375, 0.0, 0.0], dtype=torch.float64))
    cold = token_probabilities(Sampling(temperature=0.5), logits)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025], dtype=torch.float64)
    torch.testing.assert_close(cold[0], squares / squares.sum())


def test_a_draw_never_takes_what_has_no_probability():
    class Edge:
        def __init__(self, number):
            self.random = lambda: number

    probabilities = torch.tensor([[0.0, 0.1, 0.0, 0.9, 0.0]], dtype=torch.float64)
    edges = {0.0: 1, 0.0999: 1, 0.1: 3, 1 - 2**-53: 3}
    for number, token in edges.items():
        candidates = Candidates(torch.arange(10, 15).unsqueeze(0), probabilities)
        assert draw_tokens(candidates, [Edge(number)]).tolist() == [10 + token]
    assert random_generator(1, [2], 0).random() == random_generator(1, [2], 0).random()
    different = [(1, [2], 0), (2, [2], 0), (1, [3], 0), (1, [2], 1)]
    assert len({random_generator(*each).random() for each in different}) == 4


def test_a_seed_gives_the_same_text_whatever_the_batch():
    model, codec = untrained_model(IDS, 2), PromptCodec(IDS)
    prompts = ["1 2", "", "7 7 7 7", "3", "1 2", "5 4"]
    sampling = Sampling(temperature=1.5, top_k=6, seed=5)
    together = generate(model, codec, prompts, max_tokens=20, sampling=sampling, count=2)
    for prompt in set(prompts) - {"1 2"}:
        alone = generate(model, codec, [prompt], max_tokens=20, sampling=sampling, count=2)
        assert [each.text for each in together if each.prompt == prompt] == [each.text for each in alone]
    of_both = [each.text for each in together if each.prompt == "1 2"]  # the prompt stands there twice
    assert of_both == [each.text for each in generate(model, codec, ["1 2"], max_tokens=20, sampling=sampling, count=4)]
    assert len(set(of_both)) > 1
    other = generate(model, codec, prompts, max_tokens=20, sampling=Sampling(temperature=1.5, top_k=6, seed=6))
    assert [each.text for each in other] != [each.text for each in together[::2]]


def test_no_temperature_is_greedy_and_the_log_probability_is_the_models_own():
    model, codec = untrained_model(IDS, 4), PromptCodec(IDS)
    greedy = generate(model, codec, ["1", "2 2"], max_tokens=15)
    assert generate(model, codec, ["1", "2 2"], max_tokens=15, sampling=Sampling(temperature=0)) == greedy
    (drawn,) = generate(model, codec, ["4"], max_tokens=8, sampling=Sampling(temperature=3, top_k=4, seed=1))
    ids = [IDS.bos_id, 4, *IDS.encode(drawn.completion), *([IDS.eos_id] if drawn.finished else [])]
    with torch.no_grad():
        log_probabilities = model(torch.tensor(ids[:-1]).unsqueeze(1))[0].squeeze(1).log_softmax(-1)
    own = log_probabilities[1:].gather(1, torch.tensor(ids[2:]).unsqueeze(1))
    assert drawn.log_probability == pytest.approx(float(own.sum()), rel=1e-4)
    assert [value for _, value in drawn.tokens] == pytest.approx(own.squeeze(1).tolist(), rel=1e-3, abs=1e-5)


def test_a_penalty_keeps_a_text_from_repeating_itself():
    model = untrained_model(IDS, 0)
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    found = penalise(logits, torch.tensor([[True, True, False]]), 2.0)
    assert found.tolist() == [[1.0, -2.0, 0.5]]

    def distinct(penalty):
        """Different tokens in texts of eight."""
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        results = generate(model, PromptCodec(IDS, stream=True), ["1", "2", "3"], max_tokens=8, sampling=sampling)
        return sum(len({text for text, _ in each.tokens}) for each in results)

    assert distinct(5.0) > distinct(1.0)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_a_stream_is_the_text_in_pieces_of_whole_characters(kind):
    texts = ["나는 이불을 뒤집어 쓰고", "the old cat sat"] * 4
    tokenizer = train_tokenizer(kind, texts, vocab_size=300)
    codec = PromptCodec(tokenizer)
    for seed in range(4):
        model, settings = untrained_model(tokenizer, seed), {"max_tokens": 12, "sampling": Sampling(seed=seed)}
        for stop in ((), ("t", "는 이")):
            for prompt in ("", "the old"):
                pieces = list(stream(model, codec, prompt, stop=stop, **settings))
                (whole,) = generate(model, codec, [prompt], stop=stop, **settings)
                assert "".join(pieces) == whole.completion
                assert all(pieces)


def test_a_stream_holds_back_what_is_no_character_yet(monkeypatch):
    tokenizer = ByteTokenizer()
    wanted = iter([*tokenizer.encode("는a"), tokenizer.eos_id])
    monkeypatch.setattr(
        "lmtrain.inference.generation.argmax", lambda values: torch.tensor([next(wanted)] * len(values))
    )
    assert list(stream(untrained_model(tokenizer), PromptCodec(tokenizer), "", max_tokens=10)) == ["는", "a"]


def test_a_text_to_stop_at_ends_a_completion_and_is_cut_off():
    tokenizer = train_tokenizer("char", ["abcdefgh"] * 3, vocab_size=20)
    model, codec = untrained_model(tokenizer, 1), PromptCodec(tokenizer)
    (free,) = generate(model, codec, ["a"], max_tokens=30)
    assert len(free.completion) > 6
    stop = free.completion[3:5]
    at = free.completion.index(stop)
    (cut,) = generate(model, codec, ["a"], max_tokens=30, stop=["no such text", stop])
    assert cut.completion == free.completion[:at]
    assert cut.finished
    assert len(cut.tokens) == at + len(stop)


def test_backward_it_writes_what_comes_before():
    model = untrained_model(IDS, 3, bidirectional=True)
    codec = PromptCodec(IDS, direction="backward")
    prompts = ["1 2 3", "", "5"]
    together = generate(model, codec, prompts, max_tokens=6)
    for prompt, result in zip(prompts, together, strict=True):
        assert generate(model, codec, [prompt], max_tokens=6)[0].text == result.text
        assert result.text == result.completion + prompt
        ids = IDS.encode(result.text)
        # one row of the model's own reading: what each token costs from the right
        row = torch.tensor([IDS.bos_id, *ids, IDS.eos_id]).unsqueeze(1)
        with torch.no_grad():
            states, targets, _ = model.read(row, torch.tensor([len(row)])).events["backward"]
            log_probabilities = model.output.log_probabilities(states)
        written = log_probabilities[len(IDS.encode(prompt)) :]
        written[:, [IDS.pad_id, IDS.eos_id]] = -math.inf
        count = len(result.tokens)
        best = written[:count].argmax(-1).tolist()
        assert best == targets[len(IDS.encode(prompt)) :][:count].tolist()
        own = written[:count].gather(1, torch.tensor(best).unsqueeze(1)).sum()
        assert result.log_probability == pytest.approx(float(own), rel=1e-4)
