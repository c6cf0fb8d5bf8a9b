"""Text in columns whose state is carried: every token is predicted once, and no figure depends on the cuts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config import load_config
from lmtrain.data.batches.rows import Rows, make_batch
from lmtrain.data.batches.streams import LinesSampler, Span, Stream, StreamSampler
from lmtrain.data.store.token_store import Source, open_store
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import ConfigError
from lmtrain.inference.scoring import evaluate
from lmtrain.inference.trained_model import load
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.states import CarriedState, ModelState
from lmtrain.training.start import train
from tests.conftest import shared

EOS, PAD = 1, 0


def events(batch):
    """(column, token before, token) of every event, column by column."""
    found = []
    for column, length in enumerate(batch.lengths.tolist()):
        tokens = batch.tokens[:length, column].tolist()
        found += [(int(batch.order[column]), *pair) for pair in pairwise(tokens)]
    return found


@settings(max_examples=150)
@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.integers(0, 5))
def test_an_epoch_predicts_every_token_once_from_the_one_before_it(length, columns, bptt, random_bptt, epoch):
    columns = min(columns, length)
    text = np.arange(10, 10 + length, dtype=np.uint16)
    stream = Stream(text, EOS, columns)
    sampler = StreamSampler(stream, bptt=bptt, random_bptt=random_bptt, seed=3)
    spans = sampler.epoch(epoch)
    assert list(spans) == list(sampler.epoch(epoch))
    batches = [stream.batch(span, PAD) for span in spans]
    by_column = [[pair for batch in batches for column, *pair in events(batch) if column == c] for c in range(columns)]
    read = [tuple(pair) for column in by_column for pair in column]
    assert read == list(zip([EOS, *text.tolist()], text.tolist(), strict=False))
    assert max(map(len, by_column)) - min(map(len, by_column)) <= 1
    if not random_bptt:
        assert all(end - first == bptt for first, end, _ in spans[:-1])
        assert spans[-1][1] - spans[-1][0] <= bptt + 1


def test_random_chunks_differ_between_epochs():
    sampler = StreamSampler(Stream(np.arange(5000), EOS, 2), bptt=40, random_bptt=True, seed=1)
    lengths = np.array([end - first for first, end, _ in sampler.epoch(0)][:-1])
    assert list(sampler.epoch(0)) != list(sampler.epoch(1))
    assert 30 < lengths.mean() < 45
    assert lengths.std() > 2


@settings(max_examples=60)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=30), st.integers(1, 6))
def test_consecutive_lines_are_read_in_order_in_each_column(lengths, columns):
    class Lines:
        tokens = np.arange(sum(lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)

    rows = Rows(Lines, 10)
    parts = LinesSampler(rows, min(columns, len(rows))).epoch(0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    for part, following in pairwise(parts):
        assert (following == part[: len(following)] + 1).all()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(b"ab\n\nc\n", "ab..c."), (b"ab\nc", "ab.c"), (b"\n", "."), (b"a\r\n\r\nb\r\n", "a..b."), (b"a", "a")],
)
def test_a_newline_is_an_end_token_and_blank_lines_count(tmp_path, content, wanted):
    (tmp_path / "t.txt").write_bytes(content)
    store = open_store(Source((str(tmp_path / "t.txt"),), stream=True), ByteTokenizer(), tmp_path / "cache")
    text = "".join("." if token == 2 else chr(token - 4) for token in store.tokens.tolist())
    assert text == wanted
    assert store.counts.events == store.counts.characters == store.counts.bytes == len(text)


def test_a_last_line_of_blanks_without_its_newline_holds_no_word(tmp_path):
    (tmp_path / "t.txt").write_text("a b\n  ")
    tokenizer = train_tokenizer("word", ["a b"], vocab_size=10, min_frequency=1)
    store = open_store(Source((str(tmp_path / "t.txt"),), stream=True), tokenizer, tmp_path / "cache")
    assert store.tokens.tolist()[-1] == tokenizer.eos_id
    assert store.counts.sequences == 1


def test_files_without_a_last_newline_do_not_run_into_each_other(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    source = Source((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), stream=True)
    assert open_store(source, ByteTokenizer(), tmp_path / "cache").tokens.tolist() == [101, 2, 102]


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("wikitext2", "word", {"train": 2_088_628, "valid": 217_646, "test": 245_569}),
        ("tinyshakespeare", "char", {"train": 1_003_854, "valid": 111_540}),
    ],
)
def test_published_token_counts_come_out(tmp_path, name, kind, wanted):
    folder = shared(name)
    source = Source((str(folder / "train.txt"),), stream=True)
    tokenizer = train_tokenizer(kind, source.texts(), vocab_size=40000, min_frequency=1)
    for part, tokens in wanted.items():
        store = open_store(Source((str(folder / f"{part}.txt"),), stream=True), tokenizer, tmp_path / "cache")
        assert store.counts.events == tokens
        assert store.counts.unknown_tokens == 0 or name == "wikitext2"  # there <unk> is written in the text
    assert tokenizer.vocab_size == (33_280 if name == "wikitext2" else 68)  # 33,277 words and <unk>; 64 and <unk>


def model_of(**more):
    torch.manual_seed(2)
    settings = {"embedding_size": 6, "hidden_size": 7, "num_layers": 2} | more
    return LanguageModel(12, **settings).double().eval()


@pytest.mark.parametrize("more", [{}, {"cell": "gru"}, {"layer_sizes": [5, 9]}, {"ngram_embeddings": [2, 4]}], ids=str)
def test_the_cuts_do_not_show_where_the_state_is_carried(more):
    model, text = model_of(**more), np.random.default_rng(1).integers(3, 12, 61)
    whole = evaluate(model, [Stream(text, EOS, 1).batch(Span(0, 61), PAD)])
    with torch.no_grad():
        logits, _ = model(torch.tensor([EOS, *text[:-1]]).unsqueeze(1))
        wanted = torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor(text), reduction="sum")
    assert whole.tallies["forward"].nats == pytest.approx(float(wanted), rel=1e-6)
    for columns, spans in ((1, [1, 2, 3, 50]), (1, range(1, 61))):
        stream = Stream(text, EOS, columns)
        cut = [stream.batch(span, PAD) for span in stream.spans(np.array(spans))]
        found = evaluate(model, cut, columns=columns)
        assert found.tallies["forward"].tokens == 61
        assert found.tallies["forward"].nats == pytest.approx(whole.tallies["forward"].nats, rel=1e-9)
    assert evaluate(model, cut).tallies["forward"].nats != pytest.approx(float(wanted), rel=1e-6)  # nothing carried


def test_columns_keep_their_own_states_whatever_their_order():
    model, text = model_of(ngram_embeddings=[3]), np.random.default_rng(4).integers(3, 12, 47)
    stream = Stream(text, EOS, 3)  # of 16, 16 and 15 tokens
    alone = sum(
        evaluate(model, [make_batch([[text[start - 1] if start else EOS, *text[start : start + size]]], PAD)])
        .tallies["forward"]
        .nats
        for start, size in ((0, 16), (16, 16), (32, 15))
    )
    spans = stream.spans(np.array([4, 5, 9]))
    assert spans[-1] == Span(9, 16)
    found = evaluate(model, [stream.batch(span, PAD) for span in spans], columns=3)
    assert found.tallies["forward"].nats == pytest.approx(alone, rel=1e-9)
    swapped = []
    for span in spans[:-1]:
        tokens, lengths, order = stream.batch(span, PAD)
        swapped.append(type(stream.batch(span, PAD))(tokens.flip(1), lengths, order.flip(0)))
    found = evaluate(model, [*swapped, stream.batch(spans[-1], PAD)], columns=3)
    assert found.tallies["forward"].nats == pytest.approx(alone, rel=1e-9)


def test_carried_states_come_back_as_they_were_saved():
    carried = CarriedState(3)
    assert carried.of(torch.tensor([0, 1])) is None
    assert carried.tensors() == {}
    layer, history = (torch.ones(2, 4), torch.ones(2, 4) * 2), torch.tensor([[5], [6]])
    carried.store(torch.tensor([2, 0]), ModelState((layer,), history))
    other = CarriedState(3)
    other.load(carried.tensors(), torch.device("cpu"))
    ((h, c),), history = other.of(torch.tensor([0, 1, 2]))
    assert h.sum(1).tolist() == [4, 0, 4]
    assert c.sum(1).tolist() == [8, 0, 8]
    assert history.flatten().tolist() == [6, 0, 5]


@pytest.fixture
def stream(small):
    return lambda *more: small("batching.mode=stream", "model.bidirectional=false", "batching.bptt=7", *more)


def test_figures_do_not_depend_on_bptt_and_one_column_is_exact(stream, tmp_path):
    run = train(stream("training.max_epochs=3"), tmp_path / "run").run
    model = load(run)
    whole = model.evaluate(["valid.txt"])
    text = (tmp_path / "valid.txt").read_text()
    tokens = [t for line in text.splitlines() for t in (*model.tokenizer.encode(line), model.tokenizer.eos_id)]
    with torch.no_grad():
        logits, _ = model.model(torch.tensor([model.tokenizer.eos_id, *tokens[:-1]]).unsqueeze(1))
        wanted = torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor(tokens))
    assert whole.tallies["forward"].nats_per_token == pytest.approx(float(wanted), rel=1e-5)
    assert whole.figures()["tokens"] == len(tokens)
    assert whole.figures()["backward_perplexity"] is None
    with pytest.raises(ConfigError, match="one row at a time"):
        model.evaluate(["valid.txt"], batch_size=3)
    assert model.unknown_tokens("a\nb zzz\nc") == ["zzz"]
    (written,) = model.generate(["a\nb c"], max_tokens=30)
    assert written.text.startswith("a\nb c")
    assert not written.finished  # a stream has no end


def test_carried_lines_are_scored_as_one_text(small, tmp_path):
    config = small("batching.carry_state=true", "model.bidirectional=false", "batching.batch_size=3")
    model = load(train(config, tmp_path / "run").run)
    tokenizer = model.tokenizer
    reads, predicts = [], []
    for line in (tmp_path / "valid.txt").read_text().splitlines():
        ids = tokenizer.encode(line)
        reads += [tokenizer.bos_id, *ids]
        predicts += [*ids, tokenizer.eos_id]
    with torch.no_grad():
        logits, _ = model.model(torch.tensor(reads).unsqueeze(1))
        wanted = torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor(predicts))
    assert model.evaluate(["valid.txt"]).tallies["forward"].nats_per_token == pytest.approx(float(wanted), rel=1e-5)


def test_ids_stream_too(small, tmp_path):
    (tmp_path / "train.txt").write_text("1 2 3\n4 5\n" * 20)
    config = small(
        "tokenizer.kind=ids", "tokenizer.vocab_size=9", "batching.mode=stream", "model.bidirectional=false",
        "data.valid=train.txt", "logging.sample_prompts=[]",
    )  # fmt: skip
    run = train(config, tmp_path / "run").run
    assert load(run).evaluate().figures()["tokens"] == 140
    assert IdsTokenizer(9, 0).eos_id == 10


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.bidirectional=true", "model.bidirectional: a stream has no right end"),
        ("data.valid_fraction=0.1", "data.valid_fraction: "),
        ("batching.max_tokens=100", "batching.max_tokens: a stream is read in batch_size columns"),
        ("batching.carry_state=true", "batching.carry_state: a stream always carries"),
    ],
)
def test_what_a_stream_can_not_have_is_refused_in_words(stream, override, said):
    more = ["data.valid=null"] if "fraction" in override else []
    with pytest.raises(ConfigError, match=said):
        stream(override, *more)


@pytest.mark.parametrize("mode", ["mode=stream", "carry_state=true"])
def test_more_columns_than_there_is_text_are_refused(small, tmp_path, mode):
    config = small(f"batching.{mode}", "batching.batch_size=1000", "model.bidirectional=false")
    with pytest.raises(ConfigError, match=r"batching.batch_size: 1000 columns for .* are too many"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_random_bptt_goes_with_a_stream(corpus):
    with pytest.raises(ConfigError, match=r"goes with batching.mode: stream"):
        load_config("config.yaml", ["batching.random_bptt=true"])
