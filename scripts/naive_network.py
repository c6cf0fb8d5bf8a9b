"""Why a stacked two-directional network can't be trained on the next token: the proof, on the lesson.

`nn.LSTM(bidirectional=True, num_layers=2)` mixes its directions between the layers, so that every output has seen
every input, the next token among them. Trained on the next token it reads off the answer: its perplexity falls below
the true one, which is impossible without peeking, and what it writes is not in the grammar. The same sentences
are put to a trained run of lmtrain, whose two stacks never see each other.

    python scripts/naive_network.py [RUN]
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lmtrain
from lmtrain.data.batches.rows import make_batch
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.metrics import Tally

LESSON = Path(__file__).resolve().parent.parent / "data" / "lesson"


class NaiveNetwork(nn.Module):
    """Embedding, stacked two-directional LSTM, output layer: the network that one would try first."""

    def __init__(self, vocab_size: int, size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.layers = nn.LSTM(size, size, num_layers=2, bidirectional=True)
        self.output = nn.Linear(2 * size, vocab_size)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (L, B, V) from padded tokens (L, B)."""
        packed = pack_padded_sequence(self.embedding(tokens), lengths)
        logits: Tensor = self.output(pad_packed_sequence(self.layers(packed)[0])[0])
        return logits


def train_naive(sentences: list[list[int]], vocab_size: int, epochs: int) -> tuple[NaiveNetwork, float]:
    """The network and its training perplexity in the last epoch."""
    torch.manual_seed(1)
    model = NaiveNetwork(vocab_size)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    chance = random.Random(1)
    tally = Tally()
    for _ in range(epochs):
        tally = Tally()
        chance.shuffle(sentences)
        for start in range(0, len(sentences), 64):
            tokens, lengths, _ = make_batch(sentences[start : start + 64], pad_id=0)
            targets = tokens[1:]
            logits = model(tokens[:-1], lengths - 1)
            nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
            events = int(lengths.sum()) - len(lengths)
            optimizer.zero_grad()
            (nats / events).backward()
            optimizer.step()
            tally.add(float(nats.detach()), events)
    return model.eval(), tally.perplexity


@torch.no_grad()
def write(model: NaiveNetwork, tokenizer: Tokenizer, prompt: str, max_tokens: int = 40) -> str:
    """Greedy text: the network reads what there is so far, both ways; its last output is the next token."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(max_tokens):
        tokens = torch.tensor(ids).unsqueeze(1)
        token = int(model(tokens, torch.tensor([len(ids)]))[-1, 0].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def load_grammar() -> Any:
    """The lesson's automaton, out of scripts/make_lesson.py."""
    spec = importlib.util.spec_from_file_location("make_lesson", Path(__file__).with_name("make_lesson.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.lesson()


def random_prompts(count: int, seed: int = 7) -> list[str]:
    """Beginnings of test sentences, cut at random places; none is a whole sentence."""
    chance = random.Random(seed)
    sentences = [line.split() for line in (LESSON / "test.txt").read_text(encoding="utf-8").splitlines()]
    chosen = [chance.choice(sentences) for _ in range(count)]
    return [" ".join(words[: chance.randrange(len(words))]) for words in chosen]


def fraction_grammatical(texts: list[str]) -> float:
    """Fraction of the texts that are sentences of the lesson's grammar."""
    grammar = load_grammar()
    return sum(grammar.is_grammatical(text.split()) for text in texts) / len(texts)


def main() -> None:
    truth = json.loads((LESSON / "truth.json").read_text())
    lines = (LESSON / "train.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer("word", lines, vocab_size=30000, min_frequency=2)
    framed = [[tokenizer.bos_id, *tokenizer.encode(line), tokenizer.eos_id] for line in lines]
    prompts = random_prompts(200)
    print("training the naive network, two passes over the lesson ...", file=sys.stderr)
    naive, perplexity = train_naive(framed, tokenizer.vocab_size, epochs=2)
    written = [write(naive, tokenizer, prompt) for prompt in prompts]
    print(f"true training perplexity      {truth['train']['perplexity']:.3f}")
    print(f"naive network's, second epoch {perplexity:.3f}")
    print(f"naive network's sentences     {fraction_grammatical(written):.1%} grammatical")
    print(f"naive network's 'the old' ... {write(naive, tokenizer, 'the old', 12)}")
    model = lmtrain.load(sys.argv[1] if len(sys.argv) > 1 else None)
    results = model.generate(prompts)
    print(f"lmtrain's sentences           {fraction_grammatical([result.text for result in results]):.1%} grammatical")
    print(f"lmtrain's 'the old' ...       {model.generate(['the old'])[0].text}")
    evaluation = model.evaluate([str(LESSON / "test.txt")])
    for name, value in (("perplexity", truth["test"]["perplexity"]), ("fill_accuracy", truth["test"]["fill_accuracy"])):
        print(f"lmtrain's test {name:15} {evaluation.figures()[name]:.4f} (true {value:.4f})")
    print(f"lmtrain's backward perplexity  {evaluation.figures()['backward_perplexity']:.4f}")
    print(f"fill from the left alone       {truth['test']['forward_fill_accuracy']:.4f}")


if __name__ == "__main__":
    main()
