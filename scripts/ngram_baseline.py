"""An interpolated modified Kneser-Ney n-gram model, to hold a recurrent one against: bits per character of its text.

    python scripts/ngram_baseline.py runs/korean-reviews-10min [--order 5] [--characters]

It is built from the run's own training files, cut by the run's own tokenizer or into characters, and scored on the
run's own validation and test files: rows from `<bos>` to `<eos>`, or the text as one stream if the run reads it so. End
tokens are scored, and there is nothing else to go by than the last tokens.

Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128: a discount for counts of one, two, and more; lower orders
count in how many contexts a token occurs instead of how often; the lowest is mixed with the even distribution.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.preparation import source_of
from lmtrain.data.store.token_store import TokenStore, open_store
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.metrics import Tally, bits_per
from lmtrain.runs.directory import RunDirectory

Keys = NDArray[np.uint64]
Numbers = NDArray[np.float64]
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def ngrams(tokens: NDArray[np.uint64], place: NDArray[np.int64], order: int) -> tuple[Keys, NDArray[np.bool_]]:
    """A 64-bit key of the n-gram that ends at each token, and whether there is one: rows begin at place 0."""
    key = np.zeros(len(tokens), np.uint64)
    for back in range(order):
        shifted = np.concatenate([np.zeros(back, np.uint64), tokens])[: len(tokens)]
        mixed = (key ^ (shifted + np.uint64(1))) * FACTOR
        key = mixed ^ (mixed >> np.uint64(29))
    return key, place >= order - 1


class Level:
    """One order: n-grams by their counts (of contexts, below the highest order), discounts, and what is left over."""

    def __init__(self, whole: Keys, context: Keys) -> None:
        kinds, first, counts = np.unique(whole, return_index=True, return_counts=True)
        self.kinds, self.counts = kinds, counts
        n = [int((counts == k).sum()) for k in (1, 2, 3, 4)]
        y = n[0] / max(1, n[0] + 2 * n[1])
        d = [k - (k + 1) * y * n[k] / max(1, n[k - 1]) for k in (1, 2, 3)]
        self.discounts = np.array([0.0, *np.clip(d, 0.0, [1.0, 2.0, 3.0])])  # by count: 0, 1, 2, 3 and more
        of_kind = context[first]
        self.contexts, inverse = np.unique(of_kind, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.left = np.bincount(inverse, weights=self.discounts[np.minimum(counts, 3)])

    def mix(self, whole: Keys, context: Keys, lower: Numbers) -> Numbers:
        """Probabilities of this order, given those of the order below."""
        count = self._look_up(self.kinds, self.counts, whole)
        total, left = (self._look_up(self.contexts, values, context) for values in (self.totals, self.left))
        own = np.maximum(count - self.discounts[np.minimum(count, 3).astype(np.int64)], 0)
        return np.where(total > 0, (own + left * lower) / np.maximum(total, 1), lower)

    @staticmethod
    def _look_up(keys: Keys, values: NDArray[np.generic], wanted: Keys) -> Numbers:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


class KneserNey:
    """A model of the given order; `nats` scores a text, which is a row after another or one stream."""

    def __init__(self, store: TokenStore, vocab_size: int, order: int, stream: bool = False) -> None:
        self.order, self.vocab_size, self.stream = order, vocab_size, stream
        tokens, place = rows(store, stream)
        self.levels = []
        for n in range(1, order + 1):
            whole, there = ngrams(tokens, place, n)
            context = ngrams(shift(tokens), place, n - 1)[0]
            there &= place > 0  # `<bos>` is no event
            if n < order:  # of each n-gram one for each token before it; at a row's beginning nothing stands before
                longer, _ = ngrams(tokens, place, n + 1)
                longer = np.where(place >= n, longer, whole)
                _, first = np.unique(longer[there], return_index=True)
                self.levels.append(Level(whole[there][first], context[there][first]))
            else:
                self.levels.append(Level(whole[there], context[there]))

    def nats(self, store: TokenStore) -> Tally:
        """Of every token but `<bos>`."""
        tokens, place = rows(store, self.stream)
        probability = np.full(len(tokens), 1 / (self.vocab_size - 2))  # `<pad>` and `<bos>` never come
        for n, level in enumerate(self.levels, 1):
            whole, there = ngrams(tokens, place, n)
            context = ngrams(shift(tokens), place, n - 1)[0]
            probability = np.where(there, level.mix(whole, context, probability), probability)
        events = place > 0
        return Tally(float(-np.log(probability[events]).sum()), int(events.sum()))


def shift(tokens: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The token before each."""
    return np.concatenate([np.zeros(1, np.uint64), tokens[:-1]])


def rows(store: TokenStore, stream: bool) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All tokens, and the place of each in its row; in a stream, which has no `<bos>`, that of the first one is 1."""
    tokens = store.tokens.astype(np.uint64)
    if stream:
        return tokens, np.arange(1, len(tokens) + 1)
    lengths = np.diff(store.offsets.astype(np.int64))
    starts = store.offsets[:-1].astype(np.int64)
    return tokens, np.arange(len(tokens)) - np.repeat(starts, lengths)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--characters", action="store_true", help="of characters, whatever the run's tokens are")
    given = parser.parse_args(arguments)
    run = RunDirectory(given.run)
    config, tokenizer = run.config_and_tokenizer()
    if given.characters:
        texts = source_of(config, "train")
        assert texts is not None
        tokenizer = train_tokenizer("char", texts.texts(), vocab_size=1 << 16, min_frequency=2)
    with tempfile.TemporaryDirectory() as scratch:
        train, *others = (
            (name, open_store(source, tokenizer, scratch))
            for name in ("train", "valid", "test")
            if (source := source_of(config, name)) is not None
        )
        model = KneserNey(train[1], tokenizer.vocab_size, given.order, config.batching.mode == "stream")
        for name, store in others:
            tally = model.nats(store)
            print(
                f"{name}: {given.order}-gram Kneser-Ney, {tally.tokens:,} tokens, perplexity {tally.perplexity:.3f}, "
                f"{bits_per(store.counts.characters, tally.nats):.4f} bits per character"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
