"""Texts and token stores for the tests of data/."""

import random
from typing import NamedTuple

import numpy as np


def random_lines(count, seed=1):
    """Lines of up to 9 words, blank ones among them; some words are rare, some not ASCII."""
    chance = random.Random(seed)
    words = [f"w{int(1.4**n)}" for n in range(40)] + ["한국어", "e\u0301te\u0301", "the"]
    return "".join(" ".join(chance.choices(words, k=chance.randint(0, 9))) + "\n" for _ in range(count))


def store_files(store):
    """The bytes of each file of a store, by its name."""
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


class Sequences(NamedTuple):
    """What a sampler and the rows read of a token store."""

    tokens: np.ndarray
    offsets: np.ndarray


def numbered_sequences(lengths):
    """Sequences of the ids 1, 2, 3, ..., so that no two tokens are equal."""
    ends = np.cumsum(lengths)
    return Sequences(np.arange(1, ends[-1] + 1, dtype=np.uint32), np.concatenate([[0], ends]).astype(np.uint64))
