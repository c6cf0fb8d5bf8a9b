"""The lesson corpus: the same bytes at every run, and probabilities that are what they claim to be."""

import json
import math
import random
import unicodedata
from collections import Counter
from typing import Any

import pytest

from tests.conftest import ROOT, load_script

DATA = ROOT / "data" / "lesson"


make_lesson: Any = load_script("make_lesson")
automaton: Any = make_lesson.lesson()


def split_of(name: str) -> list[list[str]]:
    """The committed sentences of a split, as tokens."""
    text = (DATA / f"{name}.txt").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [line.split(" ") for line in text[:-1].split("\n")]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[list[str]]]:
    return {name: split_of(name) for name in make_lesson.SPLITS}


@pytest.fixture(scope="module")
def truths() -> dict[str, dict[str, float]]:
    read: dict[str, dict[str, float]] = json.loads((DATA / "truth.json").read_text(encoding="utf-8"))
    return read


# The files.


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_sentences_are_drawn_again_byte_for_byte(name: str) -> None:
    text = "".join(" ".join(words) + "\n" for words in make_lesson.draw(name))
    assert (DATA / f"{name}.txt").read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize("name", ["valid", "test"])
def test_truth_is_recomputed(
    name: str, splits: dict[str, list[list[str]]], truths: dict[str, dict[str, float]]
) -> None:
    assert make_lesson.truth(splits[name]) == truths[name]


def test_perplexity_of_train_is_recomputed(
    splits: dict[str, list[list[str]]], truths: dict[str, dict[str, float]]
) -> None:
    events = sum(len(words) + 1 for words in splits["train"])
    nats = -sum(automaton.log_probability(words) for words in splits["train"])
    assert truths["train"]["events"] == events
    assert truths["train"]["fill_positions"] == events - truths["train"]["sentences"]
    assert math.exp(nats / events) == pytest.approx(truths["train"]["perplexity"], abs=1e-6)


def test_readme_is_the_one_the_script_writes(
    splits: dict[str, list[list[str]]], truths: dict[str, dict[str, float]]
) -> None:
    assert (DATA / "README.md").read_bytes() == make_lesson.readme(splits, truths).encode("utf-8")


def test_readme_examples_are_sentences_of_the_grammar() -> None:
    lines = (DATA / "README.md").read_text(encoding="utf-8").splitlines()
    examples = [line.split() for line in lines if line.startswith("    ")]
    assert len(examples) >= 12 + 8
    for words in examples:
        assert automaton.is_grammatical(words), " ".join(words)


def test_truth_is_within_what_the_lesson_promises(truths: dict[str, dict[str, float]]) -> None:
    assert list(truths) == ["train", "valid", "test"]
    for figures in truths.values():
        assert 5 < figures["perplexity"] < 10
        assert figures["fill_accuracy"] - figures["forward_fill_accuracy"] >= 0.15


def test_every_sentence_is_clean_and_grammatical(splits: dict[str, list[list[str]]]) -> None:
    for name, sentences in splits.items():
        assert len(sentences) == make_lesson.SPLITS[name][0]
        for words in sentences:
            assert all(words)
            assert len(words) <= 30
            assert automaton.is_grammatical(words), " ".join(words)
        text = (DATA / f"{name}.txt").read_text(encoding="utf-8")
        assert unicodedata.is_normalized("NFC", text)
        assert "\r" not in text


def test_every_word_is_frequent_in_train(splits: dict[str, list[list[str]]]) -> None:
    counts = Counter(word for words in splits["train"] for word in words)
    assert set(counts) == set(automaton.vocabulary)
    assert min(counts.values()) >= 40
    for name in ("valid", "test"):
        assert {word for words in splits[name] for word in words} <= set(counts)


def test_few_sentences_of_test_stand_in_train(splits: dict[str, list[list[str]]]) -> None:
    known = set(map(tuple, splits["train"]))
    assert sum(tuple(words) in known for words in splits["test"]) < 0.1 * len(splits["test"])


# The automaton.


def test_all_mass_of_every_state_is_accounted_for() -> None:
    for arcs, ending in zip(automaton.arcs, automaton.ending, strict=True):
        assert all(p > 0 for _, _, p in arcs)
        assert sum(p for _, _, p in arcs) + ending == pytest.approx(1, abs=1e-12)


def test_sampling_never_passes_over_ending_weight() -> None:
    for arcs, ending in zip(automaton.arcs, automaton.ending, strict=True):
        assert (ending == 0) if arcs else (ending == 1)


def test_there_is_no_cycle_and_every_state_reaches_an_end() -> None:
    finished: dict[int, bool] = {}  # a state being visited is there with False

    def visit(state: int) -> None:
        assert finished.get(state, True), "a cycle"
        if state not in finished:
            finished[state] = False
            for _, target, _ in automaton.arcs[state]:
                visit(target)
            finished[state] = True

    visit(0)
    # Without a cycle every path ends, and it can end only where no arc leads on, with weight 1.
    assert sorted(finished) == list(range(len(automaton.arcs)))


def test_the_mass_of_all_sentences_is_one() -> None:
    mass, total = {0: 1.0}, 0.0
    while mass:
        following: dict[int, float] = {}
        for state, p in mass.items():
            total += p * automaton.ending[state]
            for _, target, q in automaton.arcs[state]:
                following[target] = following.get(target, 0.0) + p * q
        mass = following
    assert total == pytest.approx(1, abs=1e-10)


def test_log_probability_is_the_sum_of_the_forward_steps(splits: dict[str, list[list[str]]]) -> None:
    for words in splits["test"][:150]:
        steps = 0.0
        for i, word in enumerate([*words, make_lesson.EOS]):
            distribution = automaton.forward_distribution(words[:i])
            assert sum(distribution.values()) == pytest.approx(1, abs=1e-12)
            steps += math.log(distribution[word])
        assert automaton.log_probability(words) == pytest.approx(steps, abs=1e-9)


def test_posterior_is_what_substituting_every_word_gives(splits: dict[str, list[list[str]]]) -> None:
    for words in splits["test"][:12]:
        for i in range(len(words)):
            tried = {
                word: math.exp(automaton.log_probability([*words[:i], word, *words[i + 1 :]]))
                for word in automaton.vocabulary
            }
            total = sum(tried.values())
            brute = {word: p / total for word, p in tried.items() if p}
            posterior = automaton.fill_posterior(words, i)
            assert list(posterior) == sorted(brute)
            assert posterior == pytest.approx(brute, abs=1e-12)


def test_posterior_does_not_look_at_the_word_itself(splits: dict[str, list[list[str]]]) -> None:
    words = splits["test"][0]
    for i in range(len(words)):
        blanked = [*words[:i], "<mask>", *words[i + 1 :]]
        assert automaton.fill_posterior(blanked, i) == automaton.fill_posterior(words, i)


def test_samples_come_as_often_as_their_probability_says() -> None:
    rng = random.Random(7)
    first = Counter(automaton.sample(rng)[0] for _ in range(4000))
    for word, p in automaton.forward_distribution([]).items():
        assert abs(first[word] / 4000 - p) < 5 * math.sqrt(p / 4000)


def test_outside_the_grammar() -> None:
    assert automaton.log_probability([]) == -math.inf
    assert automaton.log_probability(["xyzzy"]) == -math.inf
    assert automaton.forward_distribution(["."]) == {}
    assert automaton.fill_posterior([".", "the", "."], 1) == {}


def test_best_guess_breaks_ties_by_word_order_and_never_ends() -> None:
    assert make_lesson.best_guess({"b": 0.3, "a": 0.3 * (1 - 1e-12), make_lesson.EOS: 0.4}) == "a"
    assert make_lesson.best_guess({make_lesson.EOS: 1.0}) == ""


@pytest.mark.parametrize(
    ("word", "form", "expected"),
    [
        ("별", "을", "을"),
        ("나비", "을", "를"),
        ("곰", "은", "은"),
        ("토끼", "은", "는"),
        ("나비", "과", "와"),
        ("나", "도", "도"),
    ],
)
def test_particle_agrees_with_the_final_consonant(word: str, form: str, expected: str) -> None:
    assert make_lesson.particle(word, form) == expected


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # number, across a noun of the other number
        (
            "the keys that the cat in my garden lost are old .",
            "the keys that the cat in my garden lost is old .",
        ),
        ("the dog that watched the cats is happy .", "the dog that watched the cats are happy ."),
        ("every day my sister bakes a cake .", "every day my sister bake a cake ."),
        # tense
        ("tomorrow the cats will bake a pie .", "yesterday the cats will bake a pie ."),
        ("last night the cats baked a pie .", "tomorrow the cats baked a pie ."),
        ("내일 곰 은 빵 을 먹을 것이다 .", "어제 곰 은 빵 을 먹을 것이다 ."),
        # the article
        ("yesterday a cat wrote an old letter .", "yesterday a cat wrote a old letter ."),
        ("last week a cat rode an elephant .", "last week a cat rode an pony ."),
        # verb and object
        ("every day my cat writes a poem .", "every day my cat bakes a poem ."),
        ("동생 은 구두 를 신고 천천히 걸었다 .", "동생 은 구두 를 쓰고 천천히 걸었다 ."),
        ("나 는 이불 을 덮고 쿨쿨 잤다 .", "나 는 이불 을 덮고 쿨쿨 울었다 ."),
        # quotes and brackets: unclosed, closed by the wrong kind
        ("my cat is happy ( the dog is asleep ) .", "my cat is happy ( the dog is asleep ."),
        ("my cat is happy ( the dog is asleep ) .", "my cat is happy ( the dog is asleep ” ."),
        ("“ my cat is late , ” said the dog .", "“ my cat is late , said the dog ."),
        ("나 는 《 작은 별 》 을 읽었다 .", "나 는 《 작은 별 ’ 을 읽었다 ."),
        ("나 는 《 작은 별 》 을 읽었다 .", "나 는 《 작은 별 》 을 불렀다 ."),
        (
            "곰 이 “ 토끼 도 ‘ 여우 가 논다 ’ 라고 했다 ” 하고 말했다 .",
            "곰 이 “ 토끼 도 ‘ 여우 가 논다 ” 라고 했다 ’ 하고 말했다 .",
        ),
        # particles, next to the word and behind a bracket
        ("어제 곰 은 빵 을 먹었다 .", "어제 곰 는 빵 을 먹었다 ."),
        ("어제 곰 은 사과 를 먹었다 .", "어제 곰 은 사과 을 먹었다 ."),
        ("나 는 《 나비 》 를 읽었다 .", "나 는 《 나비 》 을 읽었다 ."),
        ("소년 ( 다섯 살 ) 은 논다 .", "소년 ( 다섯 살 ) 는 논다 ."),
        # counters and the ending that the first word asks for
        ("두 마리 의 귀여운 곰 이 잔다 .", "두 명 의 귀여운 곰 이 잔다 ."),
        ("나 는 세 켤레 의 양말 을 샀다 .", "나 는 세 권 의 양말 을 샀다 ."),
        ("만약 비 가 오면 나 는 잔다 .", "비록 비 가 오면 나 는 잔다 ."),
    ],
)
def test_what_is_wrong_is_outside_the_grammar(right: str, wrong: str) -> None:
    assert automaton.is_grammatical(right.split())
    assert not automaton.is_grammatical(wrong.split())
