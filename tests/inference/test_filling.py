"""Filling a blank: neither side has seen it, enumeration agrees, and the lesson's truth is near."""

import itertools
import json

import pytest
import torch

from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.errors import ConfigError
from lmtrain.inference.filling import fill_blank
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.scoring import score
from lmtrain.model.language_model import LanguageModel
from tests.inference.conftest import untrained_model

IDS = IdsTokenizer(6, 0)


def test_one_token_is_what_both_states_say_whatever_stands_in_the_blank():
    model = untrained_model(IDS, 2, bidirectional=True)
    found = fill_blank(model, IDS, "1 2 ____ 5", top=10)
    assert sum(each.probability for each in found) == pytest.approx(1)
    assert sorted(each.text for each in found) == ["1", "2", "3", "4", "5"]
    assert [each.probability for each in found] == sorted((each.probability for each in found), reverse=True)
    assert all(each.filled == f"1 2 {each.text} 5" for each in found)
    for inside in (1, 4):
        row = torch.tensor([IDS.bos_id, 1, 2, inside, 5, IDS.eos_id]).unsqueeze(1)
        with torch.no_grad():
            states, targets, _ = model.read(row, torch.tensor([len(row)])).events["fill"]
            inner = model.output.log_probabilities(states)[2, 1:6].softmax(-1)
        assert targets[2] == inside
        for each in found:
            assert each.probability == pytest.approx(float(inner[int(each.text) - 1]), rel=1e-4)
    assert fill_blank(model, IDS, "1 2 ____ 5", top=2) == found[:2]


@pytest.mark.parametrize("text", ["1 2 ____ 5", "____ 3", "4 ____", "____"])
def test_up_to_several_tokens_are_what_enumeration_finds(text):
    model = untrained_model(IDS, 5, bidirectional=True)
    before, _, behind = text.partition("____")
    inner = [" ".join(map(str, ids)) for n in (1, 2) for ids in itertools.product(range(1, 6), repeat=n)]
    rows = [f"{before} {each} {behind}" for each in inner]
    both = score(model, PromptCodec(IDS), [Block("rows", range(1, 1 + len(rows)), rows)], direction="both")
    shares = torch.tensor([each.log_probability for each in both]).softmax(0).tolist()
    wanted = sorted(zip(shares, inner, strict=True), reverse=True)[:8]
    found = fill_blank(model, IDS, text, top=8, tokens=2)
    assert [each.text for each in found] == [ids for _, ids in wanted]
    assert [each.probability for each in found] == pytest.approx([share for share, _ in wanted], rel=1e-3)


def test_a_narrow_beam_finds_the_best_filling_most_of_the_time(monkeypatch):
    hits = 0
    for seed in range(8):
        model = untrained_model(IDS, seed, bidirectional=True)
        monkeypatch.setattr("lmtrain.inference.filling.LEAST_BEAM", 1000)
        (best,) = fill_blank(model, IDS, "1 ____ 2 3", top=1, tokens=3)
        monkeypatch.setattr("lmtrain.inference.filling.LEAST_BEAM", 12)
        (found,) = fill_blank(model, IDS, "1 ____ 2 3", top=1, tokens=3)
        hits += found.text == best.text
    assert hits >= 6


@pytest.mark.parametrize("ngrams", [[], [2, 3]])
def test_a_wide_search_reads_its_candidates_in_blocks(ngrams, monkeypatch):
    model, sizes, forward = (
        untrained_model(IDS, 3, bidirectional=True, ngram_embeddings=ngrams),
        [],
        LanguageModel.forward,
    )

    def watched(model, *inputs):
        logits, state = forward(model, *inputs)
        sizes.append(logits.numel())
        return logits, state

    whole = fill_blank(model, IDS, "1 ____ 2 3", top=20, tokens=3)
    monkeypatch.setattr("lmtrain.inference.filling.LOGITS_AT_ONCE", 50)
    monkeypatch.setattr(LanguageModel, "forward", watched)
    blocks = fill_blank(model, IDS, "1 ____ 2 3", top=20, tokens=3)
    assert [each.text for each in blocks] == [each.text for each in whole]
    assert [each.probability for each in blocks] == pytest.approx([each.probability for each in whole])
    assert 40 < max(sizes) <= 50


@pytest.mark.parametrize("kind", ["char", "word", "bpe", "byte"])
@pytest.mark.parametrize("text", ["the ____ sat", "나는 ____를 뒤집어", "____ cat", "the old ____"])
def test_a_filled_text_is_the_text_with_the_filling_in_it(kind, text):
    tokenizer = train_tokenizer(kind, ["나는 이불을 뒤집어 쓰고", "the old cat sat"] * 4, vocab_size=300)
    model = untrained_model(tokenizer, 1, bidirectional=True)
    before, _, behind = text.partition("____")
    for tokens in (1, 3):
        found = fill_blank(model, tokenizer, text, top=6, tokens=tokens)
        assert len(found) == 6
        for each in found:
            assert each.filled == before + each.text + behind
            assert "<unk>" not in each.text


@pytest.mark.parametrize(
    ("text", "said"), [("the cat", "holds no blank; mark one with ____"), ("____ a ____", "holds 2 blanks")]
)
def test_a_text_holds_one_blank(text, said):
    with pytest.raises(ConfigError, match=said):
        fill_blank(untrained_model(IDS, bidirectional=True), IDS, text)


def test_a_run_of_one_direction_fills_no_blank():
    with pytest.raises(ConfigError, match=r"reads in one direction; .*model.bidirectional: true"):
        fill_blank(untrained_model(IDS), IDS, "1 ____")


def test_score_and_fill_from_the_command_line(corpus, small, shell):
    from lmtrain.training.start import train

    run = train(small("training.max_steps=3")).run

    def said(*arguments):
        done = shell(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (first, *_) = [json.loads(line) for line in said("fill", run, "a ____ b", "--json").splitlines()]
    assert set(first) == {"text", "probability"}
    assert said("fill", "a ____ b", "--top", 1).split(maxsplit=1)[1] == f"a {first['text']} b\n"
    rows = [json.loads(line) for line in said("score", run, "valid.txt", "--json", "--tokens").splitlines()]
    lines = (corpus / "valid.txt").read_text().splitlines()
    assert [row["line"] for row in rows] == list(range(1, len(lines) + 1))
    assert [row["tokens"] for row in rows] == [len(line.split()) + 1 for line in lines]
    assert [[each["text"] for each in row["each"]] for row in rows] == [[*line.split(), "<eos>"] for line in lines]
    for row in rows:
        assert sum(each["log_probability"] for each in row["each"]) == pytest.approx(row["log_probability"])
    plain = [float(line) for line in said("score", "valid.txt", "--base", "2").splitlines()]
    assert plain == pytest.approx([row["log_probability"] / 0.6931471805599453 for row in rows], abs=1e-3)
