"""Write data/lesson: sentences drawn from a small grammar of which every true probability is known.

The grammar is a table of rules without recursion.  It compiles to a finite weighted automaton, which gives
the sentences, the exact probability of each, hence the true perplexity of a split, and the exact best guess
at every blank: a trained model can be measured against the truth instead of against another model.

Only the standard library is used, and of `random` only `Random(seed).random()`, whose stream is the same in
every version and on every machine: every run of `python scripts/make_lesson.py` writes the same bytes.
Floats are added by `+` and `math.fsum`, for the last bit of a `sum` differs between versions of Python.
"""

import argparse
import json
import math
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

EOS = "<eos>"
SPLITS: dict[str, tuple[int, int]] = {"train": (20000, 20101), "valid": (1000, 20102), "test": (1000, 20103)}

# How to read the rules (bare words are tokens; `;` parts rules that share a line):
#   name = 3 a b | c d      one of the alternatives, with weights 3 and 1 (a number is a weight)
#   { 2 | <at> }            the same inside a rule; an alternative may be empty
#   <name>                  what the rule of that name writes
#   name ~ a b c            one word of the list, the k-th with weight 1/(k+4): skewed, as words are
#   <name+은>               a word of the list `name`, then the particle in the form that the word asks for
#   <name+》+을>            the same with tokens or rules in between; the particle still agrees
#   a/an                    `a` or `an`, as the next word asks
RULES = """
sentence  = 11 <english> | 10 <korean>
english   = 20 <e_thing> | 6 <e_being> | 29 <e_time> | 7 <e_speech> | 4 <e_aside>
korean    = 6 <k_count> | 5 <k_wear> | 15 <k_time> | 7 <k_rel> | 5 <k_if> | 4 <k_speech>
          | 3 <k_aside> | 4 <k_title>

# English.  Number agrees across a relative clause whose nouns may be of the other number.
e_thing   = {3 the <adj?> <thing> <that> {3 is | was | looks}
          | 2 the <adj?> <things> <that> {3 are | were | look}} <adj> .
e_being   = {3 the <adj?> <being> <that_met> {3 is | was}
          | 2 the <adj?> <beings> <that_met> {3 are | were}} {3 <mood> | 2 <at>} .
that      = {3 that | 2} <anyone> {3 | 2 <at>} <got> {4 | 2 yesterday | last {2 week | night}}
that_met  = that <met> <anyone> {3 | 2 <at>}
anyone    = 3 <one> | 2 <ones>
one       = <some> <being>
ones      = <whose> <adj?> <beings>
some      = {2 <whose> | a/an} <adj?>
whose     = 4 the | 3 my | 2 our
at        = 3 in <some> <inside> | 3 at <some> <border> | 2 on <some> <above>
being     ~ cat sister dog friend duck aunt rabbit neighbour pony cousin
beings    ~ cats sisters dogs friends ducks aunts rabbits neighbours ponies cousins
thing     ~ key lamp coat clock chair hat ; things ~ keys lamps coats clocks chairs hats
inside    ~ garden mill kitchen ; border ~ window door lake gate ; above ~ bridge tower hill island
adj       ~ old small strange enormous lovely elegant unusual tiny famous ugly new funny ; adj? = | <adj>
got       ~ found painted lost hid bought borrowed ; met ~ followed watched woke helped found
mood      ~ asleep hungry tired happy awake late

# English.  The first word agrees with the tense of a verb further on; verb and object choose each other.
e_time    = 4 {3 yesterday {3 | morning} | 2 last {2 week | night}} <anyone> <how?> <v_past> <tail> .
          | 3 {3 tomorrow {3 | morning | night} | 2 next week} <anyone> will <how?> <v_base> <tail> .
          | 3 every {4 day | 3 morning | 2 week} {3 <one> <how?> <v_s> | 2 <ones> <how?> <v_base>} <tail> .
v_past    = 6 baked <some> <food> | 5 wrote <some> <text> | 4 painted <some> <above> | 4 found <some> <thing>
          | 4 rode <some> <mount> | 3 sang <some> <tune>
v_s       = 6 bakes <some> <food> | 5 writes <some> <text> | 4 paints <some> <above> | 4 finds <some> <thing>
          | 4 rides <some> <mount> | 3 sings <some> <tune>
v_base    = 6 bake <some> <food> | 5 write <some> <text> | 4 paint <some> <above> | 4 find <some> <thing>
          | 4 ride <some> <mount> | 3 sing <some> <tune>
food      ~ cake pie ; text ~ letter poem story song ; mount ~ pony bicycle elephant ; tune ~ song lullaby
how       ~ quietly happily slowly proudly ; how? = 3 | 2 <how>
tail      = 3 | 2 <at> | with <anyone>

# English.  Quotes and brackets close, each in its kind; at most two deep.
e_speech  = 30 “ <claim> , ” <said> <anyone> . | 20 <anyone> <said> , “ <claim> . ”
          | 7 “ <anyone> <said> , ‘ <claim> ’ , ” <said> <anyone> .
e_aside   = {3 <one> is | 2 <ones> are} <mood> ( {3 <claim> | <anyone> <said> , “ <claim> ”} ) .
claim     = {3 <one> is | 2 <ones> are} {3 <mood> | 2 <at>} | <anyone> <how?> <v_past>
said      ~ said whispered shouted replied

# Korean.  The counter between numeral and noun is decided by the noun behind it.
k_count   = 2 {3 <count> 마리 의 <kind?> <beast+이> | <beast> <count> 마리 가
          | 3 <count> 명 의 <kind?> <human+이> | <human> <count> 명 이} <doing> .
          | 3 <topic> {3 {3 | <day_past>} <goods> <bought> | 2 <kind?> <who> 에게 <goods> <gave>} .
goods     = <count> {3 권 의 <look?> <book+을> | 3 송이 의 <look?> <flower+을> | 2 켤레 의 <look?> <shoe+을>}
count     ~ 두 세 한 네 다섯 ; bought ~ 샀다 그렸다 골랐다 찾았다 숨겼다 ; gave = 2 주었다 | 보냈다
beast     ~ 고양이 곰 토끼 강아지 여우 ; human ~ 아이 소년 친구 소녀
who       ~ 동생 곰 소녀 고양이 친구 여우 누나 토끼 삼촌 강아지 아이 이모 소년
book      ~ 책 공책 그림책 ; flower ~ 꽃 장미 튤립 ; shoe ~ 장화 구두 양말 ; hat ~ 모자 우산 안경
kind      ~ 귀여운 착한 게으른 용감한 배고픈 수줍은 졸린 ; kind? = | <kind>
look      ~ 작은 빨간 예쁜 하얀 커다란 노란 이상한 ; look? = | <look>
topic     = 나 {2 는 | 도} | 7 <kind?> {3 <who+은> | 2 <who+이> | 2 <who+도>}
subject   = <kind?> {2 <who+이> | <who+도>}
doing     = <spot> {3 <busy> | 2 <v_now_k>}
busy      ~ 논다 잔다 기다린다 쉰다 노래한다 춤춘다
spot      = {3 | 2 <there>} {<how_k> | }
there     = {3 | 2 <size>} <yard> 에서
yard      ~ 마당 공원 숲 언덕 바다 부엌 지붕 ; size ~ 작은 커다란 예쁜 이상한
how_k     ~ 조용히 또 몰래 오래

# Korean.  A noun is decided by the verb behind it, an adverb too.
k_wear    = {3 | <day_past>} <topic> {3 | 2 <there>} <look?> {<indoors> | <outdoors>} .
indoors   = 이불 을 {뒤집어쓰고 | 덮고} {2 {3 쿨쿨 | 2 푹} 잤다 | <felt>}
outdoors  = {<hat+을> 쓰고 | <shoe+을> 신고}
            {{3 천천히 | 2 느릿느릿} 걸었다 | {3 신나게 | 2 폴짝폴짝} 뛰었다 | <felt>}
felt      = 3 {3 펑펑 | 2 엉엉} 울었다 | 2 {3 활짝 | 2 빙그레} 웃었다

# Korean.  The first word agrees with the tense, which only the end tells; a clause stands before its noun.
k_time    = 4 <day_past> <topic> <spot> <v_past_k> . | 3 {3 지금 | 2 요즘} <topic> <spot> <v_now_k> .
          | 3 {3 내일 | 2 모레} {2 | <hour> 에} <topic> <spot> <v_will_k> 것이다 .
k_rel     = {2 | <day_past>} <subject> <spot> {먹은 <look?> <meal+은> <very> 맛있었다
          | 읽은 <look?> <page+은> <very> 재미있었다 | 그린 <look?> <scene+은> <very> 예뻤다
          | 만든 <look?> <toy+은> <very> 멋졌다} .
v_past_k  = 6 <a_meal> 먹었다 | 5 <a_page> 읽었다 | 4 <a_scene> 그렸다 | 4 <a_toy> 만들었다
v_now_k   = 6 <a_meal> 먹는다 | 5 <a_page> 읽는다 | 4 <a_scene> 그린다 | 4 <a_toy> 만든다
v_will_k  = 6 <a_meal> 먹을 | 5 <a_page> 읽을 | 4 <a_scene> 그릴 | 4 <a_toy> 만들
a_meal    = <look?> {4 <meal+을> | <meal+도> | <meal+만>}
a_page    = <look?> {4 <page+을> | <page+도> | <page+만>}
a_scene   = <look?> {4 <scene+을> | <scene+도> | <scene+만>}
a_toy     = <look?> {4 <toy+을> | <toy+도> | <toy+만>}
meal      ~ 빵 사과 떡 포도 ; page ~ 책 편지 그림책 공책
scene     ~ 별 꽃 나비 달 숲 바다 ; toy ~ 연 인형 의자 모자 ; very = 2 | 정말 | 아주
day_past  = {3 어제 | 2 그저께} {2 | <hour> 에} ; hour ~ 아침 저녁 오후

# Korean.  만약 / 아무리 / 비록 is decided by the ending of the clause it opens.
k_if      = {3 만약 <weather> 오면 | 2 아무리 <weather> 와도 | 2 비록 <weather> 오지만} <topic> <doing> .
weather   = {3 | <hour> 에 | 2 {3 | 2 <size>} <far> 에} {3 비 가 | 2 눈 이} {2 | 많이}
far       ~ 언덕 바다 숲

# Korean.  Quotes and brackets close, and the particle behind one agrees with the word before it.
k_speech  = <topic> {3 “ <line> ” <so> <spoke> | 2 ‘ <line> ’ <so> 생각했다
          | “ <subject> ‘ <line> ’ 라고 했다 ” <so> <spoke>} .
spoke     = 3 말했다 | 2 {2 조용히 | 살짝} 속삭였다 | 2 {2 크게 | 신나게} 외쳤다
so        = 3 라고 | 2 하고 ; line = <subject> <doing>
k_aside   = {우리 | } <kind?> {3 <young+(+note+)+은> | 2 <young+(+note+)+이>} <doing> .
young     ~ 고양이 아이 곰 소년 토끼 친구 강아지 소녀 여우
note      = <age> 살 | 이름 은 <pet>
age       ~ 일곱 다섯 열 아홉 ; pet ~ 보리 콩이 두부 나비 별 달
k_title   = <topic> <spot> {3 《 <title> <star+》+을> {3 읽었다 | 2 외웠다}
          | 2 ‘ <title> <star+’+을> {3 불렀다 | 2 들었다}} .
title     = 2 <look?> | <look?> <beast+과> <look?>
star      ~ 별 달 나비 숲 바다
"""

PARTICLES = {"은": "는", "이": "가", "을": "를", "과": "와"}  # after a consonant: after a vowel

Node = Callable[[int], int]  # from the state that follows a phrase to the state that begins it
Arcs = dict[tuple[str, int], float]  # weight by (word, next state)
Vector = dict[int, float]  # weight by state, without the zeros


def particle(word: str, form: str) -> str:
    """The particle `form` (given as after a consonant) as it stands after `word`."""
    return form if (ord(word[-1]) - 0xAC00) % 28 else PARTICLES.get(form, form)


def all_rules() -> dict[str, str]:
    """Every rule of the table by name; the body of a list keeps its `~`."""
    rules: dict[str, str] = {}
    for line in re.sub(r"\n {9,}", " ", RULES).splitlines():
        for rule in line.split(" ; ") if line and line[0] != "#" else ():
            name, kind, body = rule.split(None, 2)
            rules[name] = body if kind == "=" else "~ " + body
    return rules


class Automaton:
    """A finite weighted automaton: P(sentence) = sum over its paths of the product of the arcs' weights.

    State 0 begins.  `arcs[s]` are (word, next state, weight) and `ending[s]` is the weight of stopping in s;
    in each state these sum to 1.  The grammar has no recursion, so the automaton has no cycle.
    """

    def __init__(self, rules: dict[str, str]) -> None:
        self._rules = rules
        self._built: list[tuple[Arcs, float]] = []
        self._known: dict[tuple[tuple[tuple[tuple[str, int], float], ...], float], int] = {}
        self._phrases: dict[tuple[str, int], int] = {}
        self._number_from(self._reference("sentence")(self._state({}, 1.0)))
        self.vocabulary = tuple(sorted({word for arcs in self.arcs for word, _, _ in arcs}))

    # Compiling goes from the last word to the first, so that equal states are made once.

    def _state(self, arcs: Arcs, ending: float = 0.0) -> int:
        key = (tuple(sorted(arcs.items())), ending)
        if key not in self._known:
            self._known[key] = len(self._built)
            self._built.append((dict(key[0]), ending))
        return self._known[key]

    def _word(self, word: str) -> Node:
        return self._article if word == "a/an" else lambda following: self._state({(word, following): 1.0})

    def _article(self, following: int) -> int:
        """Split the words that may follow by their first letter; each article takes its share of the mass."""
        articles: Arcs = {}
        for article in ("a", "an"):
            arcs = self._built[following][0].items()
            fitting = {arc: p for arc, p in arcs if (arc[0][0] in "aeiou") == (article == "an")}
            if mass := math.fsum(fitting.values()):
                articles[article, self._state({arc: p / mass for arc, p in fitting.items()})] = mass
        return self._state(articles)

    def _sequence(self, parts: Sequence[Node]) -> Node:
        def build(following: int) -> int:
            for part in reversed(parts):
                following = part(following)
            return following

        return build

    def _choice(self, alternatives: Sequence[tuple[float, Node]]) -> Node:
        total = math.fsum(weight for weight, _ in alternatives)

        def build(following: int) -> int:
            mixed: Arcs = {}
            mixed_ending = 0.0
            for weight, node in alternatives:
                arcs, ending = self._built[node(following)]
                mixed_ending += weight / total * ending
                for arc, p in arcs.items():
                    mixed[arc] = mixed.get(arc, 0.0) + weight / total * p
            return self._state(mixed, mixed_ending)

        return build

    def _reference(self, name: str) -> Node:
        def build(following: int) -> int:
            key = (name, following)
            if key not in self._phrases:
                self._phrases[key] = self._rule(name)(following)
            return self._phrases[key]

        return build

    def _rule(self, name: str) -> Node:
        name, *suffix = name.split("+")
        body = self._rules[name]
        if not body.startswith("~"):
            return self._alternatives(iter([*re.findall(r"[{}|]|<[^>]+>|[^\s{}|]+", body), "}"]))
        # All but the last of the suffix are tokens or rules; the last is the particle that agrees.
        between = [self._reference(s) if s in self._rules else self._word(s) for s in suffix[:-1]]
        listed: list[tuple[float, Node]] = []
        for rank, word in enumerate(body.split()[1:], 1):
            agreeing = [self._word(particle(word, s)) for s in suffix[-1:]]
            listed.append((1 / (rank + 4), self._sequence([self._word(word), *between, *agreeing])))
        return self._choice(listed)

    def _alternatives(self, pieces: Iterator[str]) -> Node:
        """Parse up to the closing brace: alternatives apart by `|`, a number is the weight."""
        alternatives: list[tuple[float, Node]] = []
        weight, parts = 1.0, list[Node]()
        for piece in pieces:
            if piece in ("|", "}"):
                alternatives.append((weight, self._sequence(parts)))
                weight, parts = 1.0, []
                if piece == "}":
                    break
            elif piece == "{":
                parts.append(self._alternatives(pieces))
            elif piece[0].isdigit():
                weight = float(piece)
            else:
                parts.append(self._reference(piece[1:-1]) if piece[0] == "<" else self._word(piece))
        return self._choice(alternatives)

    def _number_from(self, start: int) -> None:
        """Keep the states that `start` reaches, numbered in the order met, and index their arcs."""
        order, queue = {start: 0}, [start]
        for old in queue:
            for _, target in self._built[old][0]:
                if target not in order:
                    order[target] = len(queue)
                    queue.append(target)
        self.ending = [self._built[old][1] for old in queue]
        self.arcs = [[(w, order[t], p) for (w, t), p in self._built[old][0].items()] for old in queue]
        self._by_word: list[dict[str, list[tuple[int, float]]]] = [{} for _ in queue]
        self._by_target: list[dict[int, list[tuple[str, float]]]] = [{} for _ in queue]
        self._into: list[dict[str, list[tuple[int, float]]]] = [{} for _ in queue]
        for source, arcs in enumerate(self.arcs):
            for word, target, p in arcs:
                self._by_word[source].setdefault(word, []).append((target, p))
                self._by_target[source].setdefault(target, []).append((word, p))
                self._into[target].setdefault(word, []).append((source, p))
        self._marks = [list(accumulate(p for _, _, p in arcs)) for arcs in self.arcs]

    def sample(self, rng: random.Random) -> list[str]:
        """One sentence, drawn with its probability."""
        state, words = 0, list[str]()
        while self.arcs[state]:  # only the state without arcs has ending weight, so none is overlooked
            marks = self._marks[state]
            word, state, _ = self.arcs[state][min(bisect_right(marks, rng.random()), len(marks) - 1)]
            words.append(word)
        return words

    def _forward(self, words: Sequence[str]) -> list[Vector]:
        """n+1 vectors: the i-th is P(words[:i], then in state s) by state s."""
        vectors: list[Vector] = [{0: 1.0}]
        for word in words:
            vectors.append(_step(vectors[-1], self._by_word, word))
        return vectors

    def _backward(self, words: Sequence[str]) -> list[Vector]:
        """n+1 vectors: the i-th is P(words[i:], then the end | state s) by state s."""
        vectors: list[Vector] = [{s: p for s, p in enumerate(self.ending) if p}]
        for word in reversed(words):
            vectors.append(_step(vectors[-1], self._into, word))
        return vectors[::-1]

    def log_probability(self, words: Sequence[str]) -> float:
        """log P(sentence), its end included, in nats; -inf outside the grammar."""
        mass = math.fsum(p * self.ending[state] for state, p in self._forward(words)[-1].items())
        return math.log(mass) if mass else -math.inf

    def is_grammatical(self, words: Sequence[str]) -> bool:
        return self.log_probability(words) > -math.inf

    def forward_distribution(self, prefix: Sequence[str]) -> dict[str, float]:
        """P(next token | prefix), the end of the sentence as EOS; empty after an impossible prefix."""
        return self._next(self._forward(prefix)[-1])

    def _next(self, before: Vector) -> dict[str, float]:
        scores: dict[str, float] = {}
        for state, p in before.items():
            for word, _, q in [*self.arcs[state], (EOS, 0, self.ending[state])]:
                scores[word] = scores.get(word, 0.0) + p * q
        return _normalised(scores)

    def fill_posterior(self, words: Sequence[str], position: int) -> dict[str, float]:
        """P(word at `position` | all the other words and the length); what stands there is not looked at."""
        return self._fill(self._forward(words[:position])[-1], self._backward(words[position + 1 :])[0])

    def _fill(self, before: Vector, behind: Vector) -> dict[str, float]:
        scores: dict[str, float] = {}
        for state, p in before.items():
            for target, choices in self._by_target[state].items():
                for word, q in choices if target in behind else ():
                    scores[word] = scores.get(word, 0.0) + p * q * behind[target]
        return _normalised(scores)

    def fill_hits(self, words: Sequence[str]) -> tuple[int, int]:
        """How many positions (the exact posterior, the exact forward distribution) guess right."""
        forward, backward = self._forward(words), self._backward(words)
        both = sum(best_guess(self._fill(forward[i], backward[i + 1])) == w for i, w in enumerate(words))
        return both, sum(best_guess(self._next(forward[i])) == w for i, w in enumerate(words))


def _step(vector: Vector, index: list[dict[str, list[tuple[int, float]]]], word: str) -> Vector:
    """The vector carried over one word, along or against the arcs as `index` leads."""
    carried: Vector = {}
    for state, p in vector.items():
        for other, q in index[state].get(word, ()):
            carried[other] = carried.get(other, 0.0) + p * q
    return carried


def _normalised(scores: dict[str, float]) -> dict[str, float]:
    """The scores above zero divided by their sum, in word order."""
    total = math.fsum(scores.values())
    return {word: scores[word] / total for word in sorted(scores) if scores[word]}


def best_guess(distribution: dict[str, float]) -> str:
    """The likeliest word, never EOS; of equals (up to rounding) the first in word order."""
    words = sorted(word for word in distribution if word != EOS)
    most = max((distribution[word] for word in words), default=0.0)
    return next((word for word in words if distribution[word] >= most * (1 - 1e-9)), "")


@cache
def lesson() -> Automaton:
    """The automaton of the lesson."""
    return Automaton(all_rules())


def draw(split: str) -> list[list[str]]:
    """The sentences of a split: independent draws, so a sentence may come twice."""
    size, seed = SPLITS[split]
    rng = random.Random(seed)
    return [lesson().sample(rng) for _ in range(size)]


def truth(sentences: Sequence[Sequence[str]]) -> dict[str, float | int]:
    """What a perfect model scores: perplexity exp(-sum log P / sum (n+1)), the accuracies over all tokens."""
    positions = sum(len(words) for words in sentences)
    events = positions + len(sentences)
    nats = -math.fsum(lesson().log_probability(words) for words in sentences)
    hits = [lesson().fill_hits(words) for words in sentences]
    # Rounded so that the last bit of a machine's `log` cannot change the file.
    return {
        "sentences": len(sentences),
        "events": events,
        "perplexity": round(math.exp(nats / events), 6),
        "fill_accuracy": round(sum(both for both, _ in hits) / positions, 6),
        "forward_fill_accuracy": round(sum(ahead for _, ahead in hits) / positions, 6),
        "fill_positions": positions,
    }


README = """# A lesson whose truth is known

Sentences, English and Korean, drawn from a probabilistic grammar written for this project
([scripts/make_lesson.py](../../scripts/make_lesson.py)). The grammar compiles to a finite weighted automaton, so the
exact probability of every sentence is known, and with it the true perplexity of each split and the exact best guess at
every blank.

Each line is a sentence, with single spaces between its tokens; punctuation marks and Korean particles are tokens of
their own. There are {vocabulary:,} words, and {tokens:,} tokens in train, where each word occurs at least {rarest}
times. A sentence has {mean:.1f} tokens on average and {longest} at most. {repeated:.1%} of the test sentences occur in
train as well, since the draws are independent.

## Some sentences of the test split

{samples}

## What there is to learn

1. Number agreement across a relative clause, with nouns of the other number in between:

       the keys that my old aunt at the small gate lost yesterday are enormous .
       the dog that followed the ponies on our bridge was happy .

2. Quotes and brackets that close, each in its own kind, at most two deep:

       our duck is late ( the sisters said , “ my cat is asleep ” ) .
       누나 는 “ 동생 이 ‘ 곰 이 몰래 빵 을 먹는다 ’ 라고 했다 ” 라고 조용히 속삭였다 .
       나 는 숲 에서 《 작은 곰 과 하얀 달 》 을 읽었다 .

   In English: my older sister quietly whispered, “my little brother said, ‘the bear is secretly eating bread’”. I read
   “The Little Bear and the White Moon” in the forest.

3. Words that are decided only by what comes after them (a tense, a counter, an object, an ending):

       나 는 이불 을 뒤집어쓰고 펑펑 울었다 .
       세 마리 의 귀여운 강아지 가 지붕 에서 잔다 .
       비록 숲 에 눈 이 많이 오지만 게으른 곰 도 춤춘다 .
       tomorrow the famous sisters will slowly ride an elephant on the hill .

   In English: I pulled the blanket (이불, because of the verb after it) over my head and wept bitterly (펑펑 goes with
   weeping). Three cute puppies sleep on the roof (마리 counts animals, here the puppies after it). Although (비록 asks
   for the ending 지만) it snows a lot in the forest, the lazy bear dances, too.

## The truth (`truth.json`)

The figures are the best possible ones: those of a model that knows the grammar. An event is a token or the end of a
sentence, and perplexity is exp(-sum log P(sentence) / events). Fill accuracy is the fraction of all positions where the
most probable word, given all the other words and the length, is the word of the sentence. Forward fill accuracy is the
same given only the words to the left (the end of the sentence is no answer). The difference of the two is what reading
in both directions is worth.

| split | sentences | events | best possible perplexity | best possible fill accuracy | forward fill accuracy |
|---|---:|---:|---:|---:|---:|
{table}

## Making it again

`python scripts/make_lesson.py` writes the same bytes on every machine; only the standard library is needed.
"""


def readme(splits: dict[str, list[list[str]]], truths: dict[str, dict[str, float | int]]) -> str:
    """The README of the data directory."""
    counts = Counter(word for words in splits["train"] for word in words)
    known = {tuple(words) for words in splits["train"]}
    lengths = [len(words) for sentences in splits.values() for words in sentences]
    columns = ("sentences", "events", "perplexity", "fill_accuracy", "forward_fill_accuracy")
    rows = [" | ".join([name, *(f"{figures[c]:,}" for c in columns)]) for name, figures in truths.items()]
    return README.format(
        vocabulary=len(lesson().vocabulary),
        tokens=sum(counts.values()),
        rarest=min(counts[word] for word in lesson().vocabulary),
        mean=sum(lengths) / len(lengths),
        longest=max(lengths),
        repeated=sum(tuple(words) in known for words in splits["test"]) / len(splits["test"]),
        samples="\n".join("    " + " ".join(words) for words in splits["test"][:12]),
        table="\n".join(f"| {row} |" for row in rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the lesson corpus and its truth.")
    default = Path(__file__).resolve().parent.parent / "data" / "lesson"
    parser.add_argument("--out", type=Path, default=default, help="the directory to write into")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    splits = {name: draw(name) for name in SPLITS}
    truths = {name: truth(sentences) for name, sentences in splits.items()}
    files = {f"{name}.txt": "".join(" ".join(s) + "\n" for s in splits[name]) for name in SPLITS}
    files |= {"truth.json": json.dumps(truths, indent=2) + "\n", "README.md": readme(splits, truths)}
    for name, text in files.items():
        (out / name).write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    main()
