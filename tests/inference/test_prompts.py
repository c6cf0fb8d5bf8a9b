"""Ids become text: decoded while it grows, it is the text that is decoded at its end, for every tokenizer."""

import json
import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.inference.generation import generate, stream
from lmtrain.inference.options import Sampling
from lmtrain.inference.prompts import LONGEST_WINDOW, WINDOW, GrowingText, PromptCodec
from tests.inference.conftest import untrained_model

TEXTS = ["나는 이불을 뒤집어 쓰고", "the old cat sat 🐈", "zzz y"] * 4


def own(tokens, decoder, **model):
    """A tokenizer.json of one's own: these tokens, and one of the library's decoders."""
    library = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, **model))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        library.decoder = decoder
    return SubwordTokenizer(library.to_str())


def llama():
    """Pieces with their spaces as `▁`; characters without a piece are bytes, which are text only if a whole run is."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁cat", "▁the", "sat", "▁▁"]
    content = json.loads(
        Tokenizer(models.BPE(dict(zip(pieces, range(300), strict=False)), [], byte_fallback=True)).to_str()
    )
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    content["normalizer"] = {**spaces, "pattern": {"String": " "}, "content": "▁"}
    return SubwordTokenizer(json.dumps(content))


WORDS = ["[UNK]", "the", "cat", "##s", "##ing", ".", "n't", "do", "a", "</w>", "t</w>", "▁the", "▁", "|", "<pad>"]
TOKENIZERS = {
    **{kind: lambda kind=kind: train_tokenizer(kind, TEXTS, vocab_size=300) for kind in ("char", "byte", "word")},
    **{kind: lambda kind=kind: train_tokenizer(kind, TEXTS, vocab_size=280) for kind in ("bpe", "unigram")},
    "ids": lambda: IdsTokenizer(9, 0),
    "word pieces": lambda: own(WORDS, decoders.WordPiece(), unk_token="[UNK]"),
    "ends of words": lambda: own(WORDS, decoders.BPEDecoder(), unk_token="[UNK]"),
    "begins of words": lambda: own(WORDS, decoders.Metaspace(), unk_token="[UNK]"),
    "repeated tokens are one": lambda: own(WORDS, decoders.CTC(), unk_token="[UNK]"),
    "no decoder": lambda: own(WORDS, None, unk_token="[UNK]"),
    "a pattern": lambda: own(
        WORDS, decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+t"), "u")]), unk_token="[UNK]"
    ),
    "bytes for want of a piece": llama,
}
PROMPTS = {"ids": ["", "3 1", "3 1 "]}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_growing_text_is_the_completion_after_every_token(tokenizer, direction, stream):
    codec = PromptCodec(tokenizer, stream, direction)
    chance = random.Random(1)
    known = codec.encode("3 4" if tokenizer.kind == "ids" else " ".join(TEXTS[:3]))[1:]
    for prompt in PROMPTS.get(tokenizer.kind, ["", "the cat", "the ", " cat는", "a\ncat"]):
        ids = codec.encode(prompt)
        for tokens in (known * (150 // len(known)), chance.choices(range(tokenizer.vocab_size), k=150)):
            growing, before = GrowingText(codec, prompt, ids), ""
            for number, token in enumerate(tokens):
                growing.append(token)
                text = "".join(growing.characters)
                assert codec.as_written(text) == codec.completion(prompt, ids, tokens[: number + 1])
                assert text[: growing.changed] == before[: growing.changed]
                before = text


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer, monkeypatch):
        self.tokens, decode = 0, tokenizer.decode

        def counted(ids):
            self.tokens += len(ids)
            return decode(ids)

        monkeypatch.setattr(tokenizer, "decode", counted)


@pytest.mark.parametrize("stop", [(), ("no such text", "nor such")])
def test_a_token_costs_the_same_however_long_the_text_is(tokenizer, stop, monkeypatch):
    codec = PromptCodec(tokenizer, stream=True)
    model, counting = untrained_model(tokenizer, 2), Counting(tokenizer, monkeypatch)
    prompt = "3 1" if tokenizer.kind == "ids" else "the cat"
    for length in (100, 800):
        counting.tokens = 0
        for _ in stream(model, codec, prompt, max_tokens=length, sampling=Sampling(seed=1), stop=stop):
            pass
        assert counting.tokens < length * (3 * WINDOW + 2)
        counting.tokens = 0
        generate(model, codec, [prompt] * 2, max_tokens=length, sampling=Sampling(seed=1), stop=stop)
        assert counting.tokens < 2 * length * (3 * WINDOW + 3)


def test_an_endless_run_of_bytes_that_are_no_text_has_its_bound(monkeypatch):
    tokenizer = llama()
    codec, byte = PromptCodec(tokenizer, stream=True), tokenizer.library.token_to_id("<0xE3>") + 4
    for token in (byte, 3):  # 3 has no text at all
        growing, counting = GrowingText(codec, "", codec.encode("")), Counting(tokenizer, monkeypatch)
        for _ in range(4000):
            growing.append(token)
        assert counting.tokens < 4000 * 2 * LONGEST_WINDOW


def test_a_stream_is_the_generated_text(tokenizer, request):
    if "a pattern" in request.node.name:
        pytest.skip("this decoder makes 'u' of 'aat': what was printed can't be taken back")
    for seed in range(3):
        model = untrained_model(tokenizer, seed)
        for is_stream in (False, True):
            codec, settings = PromptCodec(tokenizer, is_stream), {"max_tokens": 60, "sampling": Sampling(seed=seed)}
            for prompt in PROMPTS.get(tokenizer.kind, ["", "the cat", "는"]):
                (free,) = generate(model, codec, [prompt], **settings)
                stops = [(), (free.completion[20:22] or "x",), ("no such text", "\n")]
                for stop in stops:
                    pieces = list(stream(model, codec, prompt, stop=stop, **settings))
                    (whole,) = generate(model, codec, [prompt], stop=stop, **settings)
                    assert "".join(pieces) == whole.completion
                    assert all(pieces)
                    assert not any(text in whole.completion for text in stop)
