"""Corpora larger than a window: each row once an epoch, mixed from all over the corpus, in bounded memory."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.batches import loader
from lmtrain.data.batches.order import WindowSampler, spread_rows
from lmtrain.data.batches.rows import Rows
from lmtrain.data.batches.windows import WINDOW_BLOCKS, WindowedRows, fits_a_window
from lmtrain.data.store import paging
from lmtrain.training.start import train
from tests.data.conftest import Sequences, numbered_sequences
from tests.oracle import digest

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=80).map(np.array)
SIZES = st.sampled_from([(1, None), (5, None), (None, 3), (None, 40), (None, 400)])


@st.composite
def windowed(draw):
    """Rows of sequences, some of them cut, in windows of a few rows up to all rows; and a sampler of them."""
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=1500).map(np.array))
    if draw(st.booleans()):
        lengths = np.tile(lengths, draw(st.integers(1, 20)))
    rows = WindowedRows(
        numbered_sequences(lengths),
        draw(st.integers(1, 40)),
        draw(st.integers(256, 1 << 12)),
        draw(st.integers(2048, 1 << 15)),
    )
    batch_size, max_tokens = draw(SIZES)
    settings = {"batch_size": batch_size, "max_tokens": max_tokens, "bucket_batches": draw(st.integers(1, 9))}
    return rows, lambda seed=7: WindowSampler(rows, seed=seed, **settings), lengths


def pairs(part):
    return list(zip(part.starts.tolist(), part.lengths.tolist(), strict=True))


@given(windowed(), st.integers(0, 5))
def test_an_epoch_has_every_row_once_within_its_bounds(made, epoch):
    rows, sampler, lengths = made
    whole = Rows(numbered_sequences(lengths), rows.max_length)
    assert (len(rows), rows.split_sequences) == (len(whole), whole.split_sequences)
    assert rows.mean_length == pytest.approx(whole.row_lengths.mean())
    order = sampler().epoch(epoch)
    parts = order[:]
    assert len(parts) == len(order)
    seen = sorted(pair for part in parts for pair in pairs(part))
    assert seen == list(zip(whole.starts.tolist(), whole.row_lengths.tolist(), strict=True))
    cut = sampler().cut
    for part in parts:
        assert rows.lengths(part) is part.lengths
        assert cut.batch_size is None or len(part.lengths) <= cut.batch_size
        assert (
            cut.max_tokens is None or len(part.lengths) == 1 or len(part.lengths) * max(part.lengths) <= cut.max_tokens
        )


@given(windowed(), st.data())
def test_any_batch_is_found_without_those_before_it(made, data):
    _, sampler, _ = made
    whole = list(map(pairs, sampler().epoch(2)))
    order = sampler().epoch(2)
    for place in data.draw(st.lists(st.integers(-len(whole), len(whole) - 1), min_size=1, max_size=5)):
        assert pairs(order[place]) == whole[place]
        assert list(map(pairs, order[place : place + 3])) == whole[place : place + 3]
    with pytest.raises(IndexError):
        order[len(whole)]


def test_epochs_and_seeds_differ_and_batches_are_full():
    rows = WindowedRows(numbered_sequences(np.full(20_000, 9)), 30, window_rows=4096)
    sampler = {
        seed: WindowSampler(rows, batch_size=32, max_tokens=None, bucket_batches=10, seed=seed) for seed in (7, 8)
    }
    orders = [sampler[seed].epoch(epoch) for seed in (7, 8) for epoch in (0, 1)]
    assert len({tuple(orders[place][0].starts.tolist()) for place in range(4)}) == 4
    windows = len(rows.windows(np.arange(rows.blocks)))
    assert windows == 5
    assert sum(len(part.starts) < 32 for part in orders[0]) <= windows


@given(st.integers(1, 500), st.integers(1, 60))
def test_rows_are_spread_over_full_buckets_neighbours_over_different_ones(rows, size):
    full, last = spread_rows(np.arange(rows), size, np.random.default_rng(1))
    assert full.shape[1] == size
    assert 1 <= last.shape[1] <= size
    assert sorted([*full.flatten(), *last.flatten()]) == list(range(rows))
    home = {row: number for number, bucket in enumerate([*full.tolist(), *last.tolist()]) for row in bucket}
    buckets = len(full) + 1
    turns = last.shape[1] * buckets
    if buckets > 2:
        assert all(home[a] != home[a + 1] for a in range(turns - 1) if (a + 1) % buckets)


def test_a_batch_is_mixed_from_all_of_the_text():
    """Rows of a batch are as far from each other as in a shuffle of the whole corpus, and no more are neighbours."""
    count, window = 400_000, 50_000
    lengths = np.random.default_rng(0).integers(5, 60, count)
    rows = WindowedRows(numbered_sequences(lengths), 100, window_rows=window)
    assert len(rows.windows(np.arange(rows.blocks))) > 7
    sampler = WindowSampler(rows, batch_size=32, max_tokens=None, bucket_batches=50, seed=1)
    starts = numbered_sequences(lengths).offsets[:-1]
    far, near = [], []
    for part in sampler.epoch(0)[::20]:
        place = np.searchsorted(starts, part.starts)
        distance = np.abs(place[:, None] - place)[np.triu_indices(len(place), 1)]
        far.append(distance.mean())
        near.append((distance < window / WINDOW_BLOCKS).mean())
    shuffled_near = 2 * window / WINDOW_BLOCKS / count
    assert np.mean(far) == pytest.approx(count / 3, rel=0.03)
    assert np.mean(near) < 1 / WINDOW_BLOCKS + 3 * shuffled_near  # of one block: one in so many as are in a window


@pytest.mark.parametrize("batch_size", [None, 7])
def test_evaluation_reads_every_row_once_window_by_window(batch_size):
    lengths = np.random.default_rng(0).integers(2, 60, 5000)
    rows = WindowedRows(numbered_sequences(lengths), 20, window_rows=1024)
    whole = Rows(numbered_sequences(lengths), 20)
    seen = []
    for part in rows.sorted_parts(200, batch_size):
        tokens, row_lengths, _ = rows.batch(part, 0)
        assert batch_size is None or tokens.shape[1] <= batch_size
        seen += zip(tokens[0].tolist(), row_lengths.tolist(), strict=True)
    assert sorted(seen) == list(zip((whole.starts + 1).tolist(), whole.row_lengths.tolist(), strict=True))


def test_a_corpus_fits_a_window_by_its_rows_and_by_its_bytes():
    offsets = np.zeros((1 << 20) + 2, np.uint64)
    few = np.zeros(8, np.uint16)
    assert fits_a_window(Sequences(few, offsets[:-1]))
    assert not fits_a_window(Sequences(few, offsets))
    assert fits_a_window(Sequences(np.zeros(1 << 25, np.uint16), offsets[:9]))
    assert not fits_a_window(Sequences(np.zeros((1 << 25) + 1, np.uint16), offsets[:9]))


@pytest.mark.parametrize("size", ["batching.batch_size=8", "batching.max_tokens=60"])
def test_a_run_on_windows_is_resumed_as_any_other(small, tmp_path, monkeypatch, size):
    config = small(size, "batching.max_length=4")
    at_once = train(config, tmp_path / "at_once")
    monkeypatch.setattr(loader, "fits_a_window", lambda store: False)
    whole = train(config, tmp_path / "whole")
    for stop in (3, 7):
        train(config, tmp_path / "cut", resume=True, stop_at_step=stop)
    train(config, tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole") != digest(tmp_path / "at_once")
    assert abs(whole.step - at_once.step) <= 2


def test_what_is_not_mapped_from_a_file_is_left_alone(tmp_path):
    for array in (np.arange(5), np.arange(5)[1:], np.frombuffer(b"abcd", np.uint8), np.empty(0)):
        paging.prefetch_pages(array, [(0, len(array))])
        paging.release_pages(array)
    np.arange(100_000).tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", np.int64, "r", offset=8)
    for array in (mapped, mapped[50_000:], np.asarray(mapped)[3:]):
        before = array.sum()
        paging.prefetch_pages(array, [(0, 1), (7, 40_000), (len(array) - 1, len(array))])
        paging.release_pages(array)
        assert array.sum() == before


WALK = """
import sys
from types import SimpleNamespace
import numpy as np
from lmtrain.data.batches.loader import shuffled_rows
from lmtrain.data.batches.streams import Stream, StreamSampler
from lmtrain.data.batches.windows import WindowedRows

def resident_mb():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000

kind, tokens = sys.argv[1], np.memmap(sys.argv[2], np.uint16, "r")
store = SimpleNamespace(tokens=tokens, offsets=np.arange(0, len(tokens) + 1, 250, np.uint64))
if kind == "stream":
    source = Stream(tokens, 1, 64)
    sampler = StreamSampler(source, bptt=500, random_bptt=False, seed=1)
else:
    source, sampler = shuffled_rows(store, 512, batch_size=128, max_tokens=None, bucket_batches=20, seed=1)
if kind == "evaluation":
    batches = (source.batch(part, 0) for part in source.sorted_parts(32000))
else:
    batches = (source.batch(part, 0) for part in sampler.epoch(0))
for number, batch in enumerate(batches):
    if number % 50 == 0:
        print(resident_mb())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["windows", "stream", "evaluation"])
def test_memory_stays_flat_on_a_walk_through_a_large_store(tmp_path, kind):
    with open(tmp_path / "ids", "wb") as handle:
        handle.truncate(300_000_000)
    done = subprocess.run(
        [sys.executable, "-c", WALK, kind, tmp_path / "ids"], capture_output=True, text=True, check=True
    )
    resident_mb = [float(line) for line in done.stdout.split()]
    assert len(resident_mb) > 60
    assert max(resident_mb) - resident_mb[0] < 130
    assert max(resident_mb[-20:]) < max(resident_mb[:-20]) + 10
    assert any(a > b + 20 for a, b in pairwise(resident_mb))  # some was let go
