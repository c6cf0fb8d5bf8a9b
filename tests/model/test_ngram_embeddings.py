"""Embedded n-grams depend on the last tokens read and on nothing else, however a text is cut into batches."""

import pytest
import torch

from lmtrain.data.batches.rows import make_batch
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.ngrams.embedding import NgramEmbedding
from lmtrain.model.ngrams.history import context_of, history_at
from lmtrain.training.optimization import build_optimizers, optimizer_step, optimizer_tensors, set_optimizer_tensors

BOS, EOS = 1, 2


def vectors_of(orders=(2, 3), buckets=5000):
    torch.manual_seed(1)
    ngrams = NgramEmbedding(orders, buckets, 4)
    torch.nn.init.normal_(ngrams.weight)
    return ngrams


def at_last(ngrams, tokens, history=None):
    """The vector after the last of these tokens."""
    context = context_of(torch.tensor(tokens).unsqueeze(1), ngrams.history_size, history)
    return ngrams(context, torch.tensor([len(tokens) - 1]), torch.tensor([0]))[0]


def test_a_vector_depends_on_the_last_tokens_of_its_order_alone():
    ngrams = vectors_of([3])
    same = at_last(ngrams, [4, 5, 6, 7])
    assert torch.equal(same, at_last(ngrams, [9, 5, 6, 7]))
    for other in ([4, 8, 6, 7], [4, 5, 8, 7], [4, 5, 6, 8], [5, 6, 7], [4, 6, 5, 7]):
        if other != [5, 6, 7]:
            assert not torch.equal(same, at_last(ngrams, other))
        else:
            assert torch.equal(same, at_last(ngrams, other))
    assert not torch.equal(at_last(ngrams, [6, 7]), same)  # nothing stood before


def test_orders_are_summed():
    both, two, three = vectors_of([2, 3]), vectors_of([2]), vectors_of([3])
    with torch.no_grad():
        two.weight.copy_(both.weight[:5000])
        three.weight.copy_(both.weight[5000:])
    found = at_last(both, [4, 5, 6])
    torch.testing.assert_close(found, at_last(two, [4, 5, 6]) + at_last(three, [4, 5, 6]))


def test_history_is_what_was_read_before():
    ngrams = vectors_of([2, 5])
    tokens = torch.tensor([[4, 8], [5, 8], [6, 0]])
    history = history_at(context_of(tokens, 4), 4, torch.tensor([6, 5]), torch.arange(2))
    assert history.tolist() == [[0, 5, 6, 7], [0, 0, 9, 9]]
    assert torch.equal(at_last(ngrams, [7], history[:1]), at_last(ngrams, [4, 5, 6, 7]))


def test_hashes_spread():
    ngrams = vectors_of([2], buckets=1 << 16)
    tokens = torch.cartesian_prod(torch.arange(64), torch.arange(64)).t()  # every pair of 64 tokens
    found = ngrams._buckets(context_of(tokens, 1))[1, :, 0]
    assert len(found.unique()) > 0.95 * 4096  # 1 - 4096 / 2 / 65536 of them by chance
    assert int(found.min()) >= 0
    assert int(found.max()) < 1 << 16


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_row_alone_is_what_it_is_in_a_batch(bidirectional):
    torch.manual_seed(2)
    model = LanguageModel(
        12, embedding_size=5, hidden_size=6, ngram_embeddings=[2, 4], bidirectional=bidirectional
    ).eval()
    for vectors in model.ngram_embeddings.parameters():
        torch.nn.init.normal_(vectors)
    rows = [[BOS, 4, 5, 6, 7, EOS], [BOS, 8, 9, EOS], [BOS, 4, EOS]]
    with torch.no_grad():
        whole = model.loss(*make_batch(rows, 0)[:2]).nats
        single = [model.loss(*make_batch([row], 0)[:2]).nats for row in rows]
    for name in whole:
        torch.testing.assert_close(whole[name], sum(part[name] for part in single))


def test_step_by_step_equals_at_once():
    torch.manual_seed(3)
    model = LanguageModel(12, embedding_size=5, hidden_size=6, ngram_embeddings=[2, 3], dropout=0.0).eval()
    torch.nn.init.normal_(model.ngram_embeddings["of_forward"].weight)
    tokens = torch.randint(0, 12, (7, 3))
    with torch.no_grad():
        logits, _ = model(tokens)
        state, steps = None, []
        for token in tokens:
            step_logits, state = model(token.unsqueeze(0), state)
            steps.append(step_logits[0])
        after, _ = model.read_prompts(tokens, torch.tensor([7, 7, 7]))
    torch.testing.assert_close(torch.stack(steps), logits)
    torch.testing.assert_close(after, logits[-1])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_the_vectors_of_a_batch_move_and_the_optimizer_comes_back_from_tensors(name):
    def start():
        torch.manual_seed(4)
        model = LanguageModel(12, embedding_size=5, hidden_size=6, ngram_embeddings=[2], ngram_embedding_buckets=500)
        settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
        return model, build_optimizers(model, name=name, **settings)

    def train(model, optimizers, rows):
        model.loss(*make_batch([rows], 0)[:2]).total.backward()
        assert model.ngram_embeddings["of_forward"].weight.grad.is_sparse
        optimizer_step(optimizers)

    torch.manual_seed(4)
    model, optimizers = start()
    train(model, optimizers, [BOS, 4, 5, EOS])
    moved = (model.ngram_embeddings["of_forward"].weight != 0).any(1)
    assert int(moved.sum()) == 3  # what ends at <bos>, at 4, at 5
    other, other_optimizers = start()
    other.load_state_dict(model.state_dict())
    kept = {key: value.clone() for key, value in optimizer_tensors(optimizers, model).items()}
    set_optimizer_tensors(other_optimizers, other, kept)
    for each, of_each in ((model, optimizers), (other, other_optimizers)):
        torch.manual_seed(5)
        train(each, of_each, [BOS, 4, 6, EOS])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
