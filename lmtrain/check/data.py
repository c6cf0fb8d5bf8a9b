"""What the data of a configuration is, as a model will see it: sequences, tokens, copies, markup.

The figures come from the token stores, in pieces, and from the texts. Copies are texts that are equal letter for letter
(by a hash of 64 bits), also where a model could not tell them from others since their words are unknown. A stream has
lines in place of sequences, and no copies are counted.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.check.markup import MarkupCount
from lmtrain.check.pieces import cut, token_writer
from lmtrain.config import Config
from lmtrain.data.preparation import source_of
from lmtrain.data.store.paging import release_pages
from lmtrain.data.store.token_store import COMPARED, TokenStore
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import FIRST, Tokenizer
from lmtrain.errors import escape

COLUMNS = 100  # of a line of pieces
QUOTED, QUOTED_COLUMNS = 200, 60  # characters or tokens of a beginning that is quoted, and its width in a line
FREQUENT, RARE, EXAMPLES = 8, 5, 2
LOOKED_AT = 200  # texts of a block that are searched for markup
MOST_UNKNOWN = 1 << 17  # different unknown words that are counted; beyond, the rare half is forgotten


class Finding(NamedTuple):
    """One part of the report: the lines for people, and the same figures as a row of JSON."""

    about: str
    lines: list[str]
    figures: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """The row that `lmtrain check --json` prints."""
        return {"about": self.about, **self.figures}


class _Found(NamedTuple):
    """Where a text stands, FILE:LINE, and the text."""

    place: str
    text: str


class _Read(NamedTuple):
    """What one pass through the texts of a source gives."""

    hashes: NDArray[np.int64]  # (S,) one of each text
    unknown: Counter[str]
    markup: MarkupCount


def examine_data(
    config: Config,
    tokenizer: Tokenizer,
    stores: dict[str, TokenStore],
    show: int,
    named: Callable[[str], str] = str,
) -> Iterator[Finding]:
    """Yield what the stores of a configuration hold, first of all `show` sequences as tokens.

    Args:
        named: returns a place with the user's own file in place of an excerpt's.
    """
    train, write = stores["train"], token_writer(tokenizer)
    sources = {name: source for name in stores if (source := source_of(config, name)) is not None}
    read = {name: _read(sources[name], tokenizer, stores[name].counts.unknown_tokens > 0) for name in stores}
    copies = _Copies(read["train"].hashes)
    shown, extremes = range(min(show, train.counts.sequences)), _extremes(train)
    found = _find(sources["train"], {*shown, *extremes, *copies.frequent})
    found = {number: each._replace(place=named(each.place)) for number, each in found.items()}
    yield _shown(train, tokenizer, write, {number: found[number] for number in shown})
    for about, number in zip(("longest", "shortest"), extremes, strict=True):
        count, (place, text) = len(_ids(train, tokenizer, number)), found[number]
        yield Finding(
            about,
            [f"{about}: {_tokens(count)}, {place}: {_quoted(text)}"],
            {"tokens": count, "place": place, "text": text[:QUOTED]},
        )
    yield _frequencies(train, tokenizer, write)
    for name, store in stores.items():
        if store.counts.unknown_tokens:
            yield _unknown(name, store, read[name].unknown)
    if not train.counts.stream:
        yield _copied(copies, found)
        for name in stores:
            if name != "train":
                yield _shared(name, copies, read[name].hashes, sources[name])
    if tokenizer.kind != "ids":
        for name, share, remedy in read["train"].markup.findings():
            line = f"looks like markup: {name}, in {share:.0%} of the training texts; {remedy}"
            yield Finding("markup", [line], {"looks_like": name, "share": share, "remedy": remedy})
    for store in stores.values():
        release_pages(store.tokens)


def _ids(store: TokenStore, tokenizer: Tokenizer, number: int) -> NDArray[np.unsignedinteger]:
    """Return the ids of a sequence without `<bos>` and `<eos>`, still on the disk."""
    begin, end = int(store.offsets[number]), int(store.offsets[number + 1])
    begin += not store.counts.stream
    return store.tokens[begin : end - (end > begin and store.tokens[end - 1] == tokenizer.eos_id)]


def _quoted(text: str) -> str:
    """The beginning of a text in quotes."""
    return f'"{cut(escape(text[:QUOTED], kept=""), QUOTED_COLUMNS)}"' if text else "(empty)"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _shown(store: TokenStore, tokenizer: Tokenizer, write: Callable[[int], str], shown: dict[int, _Found]) -> Finding:
    lines, rows = [], list[dict[str, Any]]()
    for number, (place, _) in shown.items():
        ids = _ids(store, tokenizer, number)
        pieces = [write(token) for token in ids[:QUOTED].tolist()]
        joined = "|".join(pieces) + ("|…" if len(ids) > len(pieces) else "")
        lines.append(f"{place}  {_tokens(len(ids))}: {cut(joined, COLUMNS) if pieces else '(empty)'}")
        rows.append({"place": place, "tokens": len(ids), "pieces": pieces})
    if lines:
        lines.insert(0, "the first training sequences as tokens, | between two tokens, ␣ for a space:")
    return Finding("sequences", lines, {"sequences": rows})


def _extremes(store: TokenStore) -> tuple[int, int]:
    """Return the numbers of the longest and of the shortest sequence."""
    longest, shortest = (-1, 0), (1 << 62, 0)
    for first in range(0, store.counts.sequences, COMPARED):
        lengths = np.diff(store.offsets[first : first + COMPARED + 1])
        most, least = int(lengths.argmax()), int(lengths.argmin())
        longest = max(longest, (int(lengths[most]), first + most), key=lambda each: each[0])
        shortest = min(shortest, (int(lengths[least]), first + least), key=lambda each: each[0])
    return longest[1], shortest[1]


def _kept(source: Source) -> Iterator[tuple[str, Sequence[int], list[str]]]:
    """Read the texts as a store keeps them, a block at a time: file, line of each text, texts."""
    continued = ""  # the file whose last text goes on in the next block
    for block in source.blocks():
        first = 1 if block.path == continued else 0  # of a long line of a stream only the beginning is looked at
        yield block.path, block.lines[first:], block.texts[first:]
        continued = "" if block.ended else block.path


def _read(source: Source, tokenizer: Tokenizer, with_unknown: bool) -> _Read:
    """Read all texts of a source once."""
    hashes, unknown, markup = [np.empty(0, np.int64)], Counter[str](), MarkupCount()
    for _, _, texts in _kept(source):
        hashes.append(np.fromiter(map(hash, texts), np.int64, len(texts)))
        markup.add(texts[:: max(1, len(texts) // LOOKED_AT)])
        if with_unknown and texts:
            unknown += tokenizer.unknown_parts(texts)
            if len(unknown) > MOST_UNKNOWN:
                unknown = Counter(dict(unknown.most_common(MOST_UNKNOWN // 2)))
    return _Read(np.concatenate(hashes), unknown, markup)


def _find(source: Source, wanted: Collection[int]) -> dict[int, _Found]:
    """Return place and text of the sequences with these numbers; the files are read only as far as needed."""
    found, number, left = dict[int, _Found](), 0, sorted(wanted, reverse=True)
    for path, lines, texts in _kept(source):
        while left and left[-1] < number + len(texts):
            each = left.pop()
            found[each] = _Found(f"{path}:{lines[each - number]}", texts[each - number])
        if not left:
            break
        number += len(texts)
    return found


def _unknown(name: str, store: TokenStore, unknown: Counter[str]) -> Finding:
    share = store.counts.unknown_tokens / store.counts.events
    most = unknown.most_common(FREQUENT)
    line = f"unknown in {name}: {share:.2%} of the tokens"
    line += f"; most often {_counted([(cut(escape(part, kept=''), 24), n) for part, n in most])}" if most else ""
    return Finding("unknown", [line], {"store": name, "share": share, "most_frequent": _rows(most)})


def _counted(parts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f'"{part}" {count:,}' for part, count in parts)


def _rows(parts: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    return [{"token": part, "count": count} for part, count in parts]


def _frequencies(store: TokenStore, tokenizer: Tokenizer, write: Callable[[int], str]) -> Finding:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for first in range(0, len(store.tokens), COMPARED):
        counts += np.bincount(store.tokens[first : first + COMPARED], minlength=len(counts))
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    if tokenizer.kind != "ids":
        special |= {*range(FIRST), tokenizer.unk_id or 0}
    own = np.setdiff1d(np.arange(len(counts)), list(special))
    order = own[np.argsort(-counts[own], kind="stable")]
    used = order[counts[order] > 0]
    frequent = [(cut(write(int(each)), 24), int(counts[each])) for each in used[:FREQUENT]]
    rare = [(cut(write(int(each)), 24), int(counts[each])) for each in used[FREQUENT:][: -RARE - 1 : -1]]
    once, never = int((counts[own] == 1).sum()), len(order) - len(used)
    lines = [f"most frequent tokens: {_counted(frequent)}"]
    if rare:
        lines.append(f"rarest tokens: {_counted(rare)}; {once:,} occur once, {never:,} of the vocabulary never occur")
    figures = {"frequent": _rows(frequent), "rare": _rows(rare), "once": once, "never": never}
    return Finding("tokens", lines, figures)


class _Copies:
    """The different texts of the training set, by their hashes.

    Attributes:
        hashes: sorted, each once.
        frequent: how often the most frequent copies occur, by the number of the first sequence with this text.
    """

    def __init__(self, hashes: NDArray[np.int64]) -> None:
        self.sequences = len(hashes)
        self.hashes, counts = np.unique(hashes, return_counts=True)
        most = [each for each in np.argsort(-counts, kind="stable")[:EXAMPLES] if counts[each] > 1]
        self.frequent = {int(np.argmax(hashes == self.hashes[each])): int(counts[each]) for each in most}


def _copied(copies: _Copies, found: dict[int, _Found]) -> Finding:
    count, copied = copies.sequences, copies.sequences - len(copies.hashes)
    examples = [(found[number].text, times) for number, times in copies.frequent.items()]
    line = "copies: no training sequence occurs twice"
    if copied:
        line = f"copies: {copied:,} of {count:,} training sequences repeat an earlier one ({copied / count:.1%})"
        line += "; most often " + ", ".join(f"{_quoted(text)} {times:,} times" for text, times in examples)
    rows = [{"text": text[:QUOTED], "count": times} for text, times in examples]
    return Finding("copies", [line], {"sequences": count, "copies": copied, "most_frequent": rows})


def _shared(name: str, copies: _Copies, hashes: NDArray[np.int64], source: Source) -> Finding:
    """How many sequences of another set stand in the training set, too."""
    matches = copies.hashes[np.minimum(np.searchsorted(copies.hashes, hashes), len(copies.hashes) - 1)] == hashes
    shared, count = int(matches.sum()), len(hashes)
    texts = [each.text for each in _find(source, np.flatnonzero(matches)[:EXAMPLES].tolist()).values()]
    line = f"in both training and {name}: {shared:,} of {count:,} {name} sequences"
    line += f" ({shared / count:.1%}), for instance {', '.join(map(_quoted, texts))}" if shared else ""
    examples = [text[:QUOTED] for text in texts]
    return Finding("shared", [line], {"store": name, "sequences": count, "shared": shared, "examples": examples})
