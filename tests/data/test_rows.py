"""Rows, batches, samplers and the loader: properties that hold for any lengths of sequences."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config.schema import BatchingConfig
from lmtrain.data.batches.loader import BatchLoader, TrainingBatches
from lmtrain.data.batches.order import EpochSampler, WindowSampler
from lmtrain.data.batches.rows import Rows, make_batch, sorted_parts
from lmtrain.data.batches.streams import LinesSampler, Stream, StreamSampler
from lmtrain.data.batches.windows import WindowedRows
from tests.conftest import shared
from tests.data.conftest import Sequences, numbered_sequences

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=80).map(np.array)


def sampler_of(lengths, batch_size=5, max_tokens=None, seed=7):
    return EpochSampler(np.asarray(lengths), batch_size=batch_size, max_tokens=max_tokens, bucket_batches=3, seed=seed)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_a_batch_holds_its_rows_longest_first(rows):
    tokens, lengths, order = make_batch(rows, pad_id=0)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert lengths.tolist() == sorted(map(len, rows), reverse=True)
    for column, row in enumerate(order.tolist()):
        assert tokens[:, column].tolist() == rows[row] + [0] * (len(tokens) - len(rows[row]))
    same = [(a, b) for a, b in zip(order.tolist(), order[1:].tolist(), strict=False) if len(rows[a]) == len(rows[b])]
    assert all(a < b for a, b in same)  # equal lengths keep their order


@given(LENGTHS, st.integers(0, 5), st.sampled_from([(5, None), (None, 40), (None, 3)]))
def test_an_epoch_is_a_permutation_within_its_bounds(lengths, epoch, size):
    batch_size, max_tokens = size
    batches = sampler_of(lengths, batch_size, max_tokens).epoch(epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert batch_size is None or len(batch) <= batch_size
        assert max_tokens is None or len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens


@given(LENGTHS)
def test_an_epoch_is_a_function_of_seed_and_epoch(lengths):
    for epoch in range(3):
        for once, again in zip(sampler_of(lengths).epoch(epoch), sampler_of(lengths).epoch(epoch), strict=True):
            assert once.tolist() == again.tolist()
    if len(lengths) > 20:
        order = [
            np.concatenate(sampler_of(lengths, seed=seed).epoch(epoch)).tolist() for seed in (7, 8) for epoch in (0, 1)
        ]
        assert len(set(map(tuple, order))) == 4


@pytest.mark.parametrize(
    ("batch_size", "max_tokens", "wanted"),
    [
        (7, None, "1cc21d371996038be49c96d433239851ee66d772f27829b490d96b4e28aa9e15"),
        (None, 300, "48c5d6b0589080dd18cc6222371cfdc538e917c9d8f96bb9b1ff42daf57f7604"),
    ],
)
def test_the_order_of_a_corpus_that_fits_a_window_is_what_it_always_was(batch_size, max_tokens, wanted):
    """A run that an earlier lmtrain began continues in the same order, and published results can be reproduced."""
    lengths = np.random.Generator(np.random.PCG64(5)).integers(2, 60, 5000)
    sampler = EpochSampler(lengths, batch_size=batch_size, max_tokens=max_tokens, bucket_batches=9, seed=3)
    digest = hashlib.sha256()
    for epoch in range(3):
        for part in sampler.epoch(epoch):
            digest.update(len(part).to_bytes(4, "little") + part.astype("<i8").tobytes())
    assert digest.hexdigest() == wanted


def test_buckets_keep_padding_low_and_batches_are_shuffled():
    lengths = np.random.default_rng(0).integers(2, 60, 3000)
    batches = EpochSampler(lengths, batch_size=20, max_tokens=None, bucket_batches=50, seed=1).epoch(0)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert 1 - lengths.sum() / padded < 0.03
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest != sorted(longest, reverse=True)


@given(LENGTHS, st.integers(1, 12))
def test_split_rows_predict_each_token_once(lengths, max_length):
    sequences = numbered_sequences(lengths)
    rows = Rows(sequences, max_length)
    assert rows.row_lengths.max() <= max_length + 2
    assert rows.row_lengths.min() >= 2
    assert rows.split_sequences == int((lengths > max_length + 2).sum())
    read = [sequences.tokens[s : s + n].tolist() for s, n in zip(rows.starts, rows.row_lengths, strict=True)]
    firsts, lasts = set(sequences.offsets[:-1] + 1), set(sequences.offsets[1:])
    assert sorted(token for row in read for token in row[1:]) == sorted(set(range(1, lengths.sum() + 1)) - firsts)
    assert sorted(token for row in read for token in row[:-1]) == sorted(set(range(1, lengths.sum() + 1)) - lasts)


@given(LENGTHS, st.sampled_from([1, 4, None]))
def test_evaluation_reads_every_row_once(lengths, batch_size):
    sequences = numbered_sequences(lengths)
    seen = []
    rows = Rows(sequences, 100)
    for part in sorted_parts(rows.row_lengths, 64, batch_size):
        tokens, row_lengths, _ = rows.batch(part, pad_id=0)
        assert batch_size is None or tokens.shape[1] <= batch_size
        seen += [tokens[:length, column].tolist() for column, length in enumerate(row_lengths.tolist())]
    assert sorted(seen) == [
        sequences.tokens[a:b].tolist() for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)
    ]


def new_loader(kind, lengths, epoch=0, next_batch=0):
    """A new loader of two batches a step, with a new source and a new sampler."""
    rows = Rows(numbered_sequences(lengths), max_length=9)
    columns = min(3, len(rows))
    stream = Stream(rows.flat, 0, min(3, len(rows.flat)))
    windowed = WindowedRows(numbered_sequences(lengths), max_length=9, window_rows=8)
    source, sampler = {
        "sentences": (rows, sampler_of(rows.row_lengths)),
        "windows": (windowed, WindowSampler(windowed, batch_size=5, max_tokens=None, bucket_batches=3, seed=7)),
        "lines": (rows, LinesSampler(rows, columns)),
        "stream": (stream, StreamSampler(stream, bptt=5, random_bptt=False, seed=7)),
        "random stream": (stream, StreamSampler(stream, bptt=5, random_bptt=True, seed=7)),
    }[kind]
    return BatchLoader(TrainingBatches(source, sampler, None), 0, 2, epoch, next_batch)


def load_steps(loader, count):
    """(epoch, number of batches of the epoch so far, the batches as lists) of the next steps."""
    steps = [loader.take() for _ in range(count)]
    loader.close()
    return [(step.epoch, step.end, [[t.tolist() for t in each.batch] for each in step.batches]) for step in steps]


@pytest.mark.parametrize("kind", ["sentences", "windows", "lines", "stream", "random stream"])
@settings(max_examples=20)
@given(lengths=st.lists(st.integers(2, 25), min_size=1, max_size=25).map(np.array))
def test_a_new_loader_continues_from_every_step_as_if_never_stopped(kind, lengths):
    """The state of every sampler is (epoch, next batch); a resume replays nothing."""
    loader = new_loader(kind, lengths)
    epoch_steps = -(-loader.peek().epoch_batches // 2)
    whole = load_steps(loader, 5 * epoch_steps)
    assert whole[-1][0] > 0
    for number, (epoch, end, _) in enumerate(whole[:-3]):
        assert load_steps(new_loader(kind, lengths, epoch, end), 3) == whole[number + 1 : number + 4]


@given(LENGTHS, st.data())
def test_rows_of_a_batch_are_counted_and_selected_without_reading_them(lengths, data):
    """Several processes need this to divide a batch among themselves."""
    rows = Rows(numbered_sequences(lengths), 9)
    windowed = WindowedRows(numbered_sequences(lengths), 9, window_rows=256)
    part = np.arange(len(rows))[::2]
    stretches = windowed.stretches(np.arange(windowed.blocks))
    chosen = np.array(data.draw(st.lists(st.integers(0, len(part) - 1), min_size=1, unique=True)))
    for source, whole in ((rows, part), (windowed, windowed.take(stretches, part))):
        batch = source.batch(whole, 0)
        assert source.lengths(whole)[batch.order.numpy()].tolist() == batch.lengths.tolist()
        some = source.batch(source.take(whole, chosen), 0)
        column = {int(row): tokens.tolist() for row, tokens in zip(batch.order, batch.tokens.T, strict=True)}
        for row, tokens in zip(some.order, some.tokens.T, strict=True):
            assert column[int(chosen[row])][: len(tokens)] == tokens.tolist()


def test_rows_need_at_least_one_token():
    with pytest.raises(ValueError):  # noqa: PT011  # NumPy words it
        make_batch([], pad_id=0)


@given(LENGTHS, st.integers(1, 4))
def test_the_loader_loads_the_samplers_batches_from_any_step_on(lengths, size):
    rows, sampler = Rows(numbered_sequences(lengths), 512), sampler_of(lengths)
    wanted = [
        (epoch, first + len(order[first : first + size]), len(order), order[first : first + size])
        for epoch in range(3)
        for order in [sampler.epoch(epoch)]
        for first in range(0, len(order), size)
    ]
    epoch_steps = len(wanted) // 3
    for begin in range(2 * epoch_steps):
        epoch, first = wanted[begin][0], (begin % epoch_steps) * size
        loader = BatchLoader(TrainingBatches(rows, sampler, None), 0, size, epoch, first)
        for epoch, end, epoch_batches, indices in wanted[begin : begin + epoch_steps]:
            peeked, step = loader.peek(), loader.take()
            assert peeked is step
            assert (step.epoch, step.end, step.epoch_batches) == (epoch, end, epoch_batches)
            assert step.ends_epoch == (end == epoch_batches)
            for loaded, rows_of_batch in zip(step.batches, indices, strict=True):
                assert loaded.batch.tokens.equal(rows.batch(rows_of_batch, 0).tokens)
                assert (loaded.rows, loaded.tokens, loaded.longest) == (
                    len(rows_of_batch),
                    lengths[rows_of_batch].sum(),
                    lengths[rows_of_batch].max(),
                )
        loader.close()


def test_the_loader_reports_how_long_batches_were_waited_for():
    class SlowRows(Rows):
        def batch(self, part, pad_id):
            time.sleep(0.1)
            return super().batch(part, pad_id)

    lengths = np.full(20, 5)
    loader = BatchLoader(TrainingBatches(SlowRows(numbered_sequences(lengths), 512), sampler_of(lengths), None), 0, 2)
    loader.take()
    assert 0.15 < loader.waited_s < 2  # two batches of 0.1 s
    waited_s = loader.waited_s
    time.sleep(0.5)  # the next ones are loaded meanwhile
    loader.take()
    assert loader.waited_s < waited_s + 0.1
    loader.close()


@pytest.mark.parametrize("split", [str.split, list], ids=["words", "characters"])
@pytest.mark.parametrize("name", ["hdfs_sessions", "korean_reviews", "names", "tinyshakespeare", "wikitext2"])
def test_default_buckets_waste_at_most_three_percent_on_padding(name, split):
    lines = (shared(name) / "train.txt").read_text(encoding="utf-8").splitlines()
    settings = BatchingConfig()
    ends = np.cumsum([0] + [len(split(line)) + 2 for line in lines if line.strip()])
    rows = Rows(Sequences(np.zeros(0, np.uint32), ends.astype(np.uint64)), settings.max_length)
    batches = EpochSampler(
        rows.row_lengths,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        bucket_batches=settings.bucket_batches,
        seed=1,
    ).epoch(0)
    padded = sum(int(rows.row_lengths[batch].max()) * len(batch) for batch in batches)
    assert padded <= rows.row_lengths.sum() / 0.97
