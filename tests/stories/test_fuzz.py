"""Whatever stands in a file: it is taken and of use, or one of lmtrain's own errors says in a line what is wrong.

The examples are the same in each run. LMTRAIN_FUZZ_SECONDS=600 lets each fuzzer run for 600 seconds with new ones.
"""

import base64
import copy
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.config import dump_config, load_config
from lmtrain.data.store.token_store import Source, open_store
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.data.tokenizers.learning import train_tokenizer
from lmtrain.data.tokenizers.loading import parse_tokenizer
from lmtrain.data.tokenizers.subword import SubwordTokenizer
from lmtrain.data.tokenizers.vocabulary import ByteTokenizer
from lmtrain.errors import ArtefactError, ConfigError, DataError, escape
from lmtrain.runs import checkpoint
from tests.conftest import ROOT

SECONDS = float(os.environ.get("LMTRAIN_FUZZ_SECONDS", "0"))
LONGEST_S, LARGEST_BYTES = 1.0, 200 << 20


def fuzz(examples, *strategies):
    """Run a test on this number of examples, or for as long as LMTRAIN_FUZZ_SECONDS says."""
    how = settings(
        max_examples=examples,
        derandomize=not SECONDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def around(test):
        once = how(given(*strategies)(test))

        @functools.wraps(once)
        def again(*arguments, **more):
            end_s = time.monotonic() + SECONDS
            once(*arguments, **more)
            while time.monotonic() < end_s:
                once(*arguments, **more)

        return again

    return around


def memory_bytes(name):
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) << 10 for line in handle if line.startswith(f"{name}:"))


@contextmanager
def raises_only(kind):
    """What happens within is quick and small, and raises nothing but an error of this kind that can be shown."""
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the peak counts from here
    before_bytes, before_s = memory_bytes("VmRSS"), time.process_time()
    faults = ("one line",)
    try:
        yield
    except kind as error:
        faults = error.faults
    assert time.process_time() - before_s < LONGEST_S
    assert memory_bytes("VmHWM") - before_bytes < LARGEST_BYTES
    assert faults
    for fault in (escape(fault, kept="") for fault in faults):
        assert fault.strip()
        assert not [each for each in fault if unicodedata.category(each) == "Cc" and each != "\t"], fault


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory of all examples."""
    before, home = os.getcwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(home)
    (home / "t.txt").write_text("a b\n")
    yield home
    os.chdir(before)


@st.composite
def altered(draw, data):
    """Bytes with some bits flipped, some of them cut out or doubled, and others put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        few = draw(st.sampled_from([1, 2, 7, 64, 1 << 20]))
        match draw(st.sampled_from(["flip", "cut", "double", "insert"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place : place + few]
            case "double":
                data[place:place] = data[place : place + few]
            case _:
                data[place:place] = draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


NUMBERS = [0, -1, 1, 2, 3.5, -0.0, 1 << 31, (1 << 53) + 1, 1 << 63, 1 << 64, 1 << 70, 1e308, float("inf"), float("nan")]
WORDS = ["", "a", "\x1b[2J\n", "\ud800", "\0", "é", "한", "../x", "1", "(", "<unk>", "x" * 5000]
ODD = [*NUMBERS, *WORDS, None, True, False, [], {}, [[]], [{}], {"a": 1}, {"": None}, ["a", "a"], [0] * 5000]
DEEP = functools.reduce(lambda inner, _: [inner], range(200), None)


@st.composite
def altered_tree(draw, tree, odd=(*ODD, DEEP)):
    """JSON with some of its values replaced by odd ones or by each other's, or taken out."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        node, key = tree, ""
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
            node = node[key]
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if node is not tree and draw(st.integers(0, 4)) == 0:
            del node[key]
        elif node is not tree and draw(st.integers(0, 4)) == 0 and isinstance(node, dict):
            node[key] = copy.deepcopy(draw(st.sampled_from([*node.values()])))
        else:
            node[key] = copy.deepcopy(draw(st.sampled_from(odd)))
    return tree[""]


def altered_json(tree):
    """The text of altered JSON, or altered text of it."""
    return st.one_of(altered_tree(tree).map(json.dumps).map(str.encode), altered(json.dumps(tree).encode()))


# configurations

SCALARS = [
    "", "~", "yes", "true", "1e3", "1e999", ".nan", "-.inf", "-1", "0", "0x1F", "0o17", "1_000", "12:30", "9" * 70,
    "2026-01-01", "=", "<<", "*a", "&a 1", "&a", "!!python/object:os.system x", "!!binary aGk=", "!x y", "!<tag:x> y",
    "|", ">-", "|9", "'", '"', '"\\x1b[2J\\n"', '"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', '"a\\nb"', "[", "]", "{", "}",
    "[a, [b, {c: d}]]", "{a: 1, a: 2}", "{? [a] : b}", "? a", "- a", "a: b: c", "#", "%YAML 9.9", "---", "...", "\t",
    "\ufeff", "\x85", "\u2028", "\x1b", "\0", "한", "[" * 40, "{a: " * 40, "[" * 5000, "- " * 5000, "{<<: {a: 1}}",
    "@x", "`x", "%x", "a#b", "a #b", "!!float x", "!!set {a}", "!!null", "[1, 2, 3]", "gru", "..", "a/b", "x" * 300,
]  # fmt: skip
TEMPLATES = sorted((ROOT / "configs").rglob("*.yaml"))
WHOLE = dump_config(load_config(ROOT / "configs" / "quickstart.yaml", check_files=False))


@st.composite
def altered_yaml(draw):
    """A template, or a configuration of all keys, with lines dropped, doubled, moved and given odd values and keys."""
    lines = draw(st.sampled_from([WHOLE, *(path.read_text() for path in TEMPLATES)])).splitlines()
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(lines) - 1))
        scalar = draw(st.sampled_from(SCALARS))
        key = lines[place].partition(":")[0]
        match draw(st.sampled_from(["drop", "double", "move", "value", "key", "indent"])):
            case "drop":
                lines[place : place + 1] = [] if len(lines) > 1 else [""]
            case "double":
                lines.insert(place, lines[place])
            case "move":
                lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(place))
            case "value":
                lines[place] = f"{key}: {scalar}"
            case "key":
                lines[place] = lines[place].replace(key.strip() or "#", scalar, 1)
            case "indent":
                lines[place] = " " * draw(st.integers(0, 5)) + lines[place].strip()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


KEYS = st.sampled_from(["seed", "model", "model.cell", "data.train", "name", "", ".", "a.b", "training.max_epochs.x"])
OVERRIDES = st.builds("{}={}".format, KEYS, st.sampled_from(SCALARS)) | st.sampled_from(SCALARS)


def check_config(data, overrides=()):
    with open("c.yaml", "wb") as handle:
        handle.write(data)
    with raises_only(ConfigError):
        config = load_config("c.yaml", overrides, check_files=False)
        with open("again.yaml", "w", encoding="utf-8", newline="") as handle:
            handle.write(dump_config(config))
        assert load_config("again.yaml", check_files=False) == config


@fuzz(150, st.binary(max_size=300) | altered(WHOLE.encode()))
def test_any_bytes_as_a_config(data):
    check_config(data)


@fuzz(150, altered_yaml(), st.lists(OVERRIDES, max_size=2))
def test_an_altered_config(data, overrides):
    check_config(data, overrides)


@pytest.mark.parametrize("key", ["a\\nb", "\\x1b[2J\\r", "\\ud800", "\\0", "\\x85"])
def test_a_key_that_is_no_text(key):
    for text in (f'"{key}": 1\n', f'data: {{train: t.txt}}\nmodel: {{"{key}": 1}}\n'):
        check_config(text.encode())
        with pytest.raises(ConfigError):
            load_config("c.yaml")


@pytest.mark.parametrize("override", ["\udcff=3", "model.\udcff=3", "model.cell=\udcff", "a\nb=1", "\udcff", "\0=1"])
def test_an_override_that_is_no_text(override):
    """As the shell gives arguments that are not UTF-8."""
    check_config(b"data: {train: t.txt}\n", [override])


# texts and ids


def stored(content, name, tokenizer, **more):
    """The sequences that the store of a file holds, its end tokens cut off."""
    with open(name, "wb") as handle:
        handle.write(content)
    try:
        store = open_store(Source((name,), **more), tokenizer, "cache")
        return [store.tokens[int(a) : int(b)].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    finally:
        shutil.rmtree("cache", ignore_errors=True)


IDS = b"1 2 3\n\n40 5\t6 7\r\n  8 9\n" * 3
ID_WORDS = [b"0", b"-1", b"99", b"100", b"+5", b"007", b"1_0", b"1.0", b"1e1", b"x", b"\xd9\xa3", b"\xff", b"\0", b"\n"]
ID_WORDS += [str(1 << bits).encode() for bits in (16, 31, 32, 63, 64, 70)] + [b"9" * 5000, b"\x0b", b"\xe2\x80\xa8"]
ID_LINES = st.lists(st.sampled_from([*ID_WORDS, *IDS.split(b" ")]), max_size=20).map(b" ".join)


@fuzz(150, st.binary(max_size=200) | altered(IDS) | ID_LINES, st.booleans())
def test_any_bytes_as_ids(data, stream):
    tokenizer = IdsTokenizer(100, pad_id=0)
    with raises_only(DataError):
        sequences = stored(data, "ids.txt", tokenizer, format="ids", stream=stream)
        wanted = [int(word) for word in unicodedata.normalize("NFC", data.decode("utf-8-sig")).split()]
        assert [token for row in sequences for token in row if token < 100] == wanted
        assert " ".join(filter(None, map(tokenizer.decode, sequences))) == " ".join(map(str, wanted))


LINES = "one two\r\n\n나는 e\u0301 🎉\nlast".encode()
TEXTS = st.binary(max_size=300) | altered(LINES)


@fuzz(150, TEXTS, st.booleans())
def test_any_bytes_as_a_text(data, stream):
    with raises_only(DataError):
        sequences = stored(data, "t.txt", ByteTokenizer(), stream=stream)
        text = unicodedata.normalize("NFC", data.decode("utf-8-sig"))
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        if stream:
            lines = lines[:-1] if text.endswith("\n") else lines
        wanted = lines if stream else [line for line in lines if line.strip()]
        assert list(map(ByteTokenizer().decode, sequences)) == wanted


@fuzz(150, st.binary(max_size=200) | altered(gzip.compress(LINES * 20, mtime=0)) | TEXTS.map(gzip.compress))
def test_any_bytes_as_a_gz(data):
    with raises_only(DataError):
        sequences = stored(data, "t.gz", ByteTokenizer())
        assert sequences == stored(gzip.decompress(data), "unpacked.txt", ByteTokenizer())


RECORD = {"id": 3, "text": "a 한\n🎉", "more": {"text": ["b", None]}}
RECORDS = st.lists(altered_json(RECORD) | st.just(b'{"text": "fine"}'), min_size=1, max_size=4).map(b"\n".join)


@fuzz(150, st.binary(max_size=200) | RECORDS, st.booleans())
def test_any_bytes_as_jsonl(data, stream):
    with raises_only(DataError):
        sequences = stored(data, "t.jsonl", ByteTokenizer(), stream=stream, field="text")
        records = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        texts = [record if isinstance(record, str) else record["text"] or "" for record in records]
        lines = [re.sub("\r(\r?\n)?", "\n", text.encode("utf-8", "replace").decode()) for text in texts]
        wanted = [unicodedata.normalize("NFC", text).strip("\n") for text in lines]
        assert [text for text in map(ByteTokenizer().decode, sequences) if text.strip()] == [
            text for text in wanted if text.strip()
        ]


@pytest.fixture(scope="module")
def built(folder):
    """A source, what its store counts, and its store.json."""
    (folder / "built.txt").write_text("a b\nc\n")
    source = Source(("built.txt",))
    store = open_store(source, ByteTokenizer(), "built")
    path = store.directory / "store.json"
    return source, store.counts, path, path.read_bytes()


def check_store(built, content):
    source, wanted, path, _ = built
    path.write_bytes(content)
    with raises_only(DataError):
        store = open_store(source, ByteTokenizer(), "built")
        assert (asdict(store.counts), len(store.tokens)) == (asdict(wanted), wanted.tokens)


@fuzz(100, st.data())
def test_an_altered_store_is_built_again(built, data):
    check_store(built, data.draw(altered_json(json.loads(built[-1]))))


@pytest.mark.parametrize(
    "change", [{"tokens": 1 << 70}, {"tokens": 1e999}, {"sequences": 0}, {"characters": 1}], ids=str
)
def test_a_store_that_counts_wrongly_is_built_again(built, change):
    check_store(built, json.dumps(json.loads(built[-1]) | change).encode())


def test_a_store_nested_too_deep_is_built_again(built):
    check_store(built, b"[" * 100000)


# checkpoints

torch.manual_seed(1)
TENSORS = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(()), "d": torch.ones(0)}


@pytest.fixture(scope="module")
def saved(folder):
    """The bytes of each file of a good checkpoint."""
    checkpoint.save(folder / "good", checkpoint.Checkpoint(3, TENSORS, TENSORS, {"step": 3}))
    return {path.name: path.read_bytes() for path in checkpoint.directory_of(folder / "good", 3).iterdir()}


def write_files(folder, files):
    home = checkpoint.directory_of(folder / "bad", 3)
    home.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (home / name).write_bytes(data)
    return folder / "bad"


def dumped(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def sealed(manifest):
    """A manifest's bytes as one writes them who knows how we do it."""
    return dumped(manifest | {"sha256": hashlib.sha256(dumped(manifest)).hexdigest()})


def manifest_of(files):
    manifest = json.loads(files["manifest.json"])
    manifest.pop("sha256", None)
    return manifest


@fuzz(150, st.data())
def test_an_altered_checkpoint_is_never_taken(folder, saved, data):
    name = data.draw(st.sampled_from(["manifest.json", "manifest.json", "model.safetensors", "training.safetensors"]))
    if name == "manifest.json" and data.draw(st.booleans()):
        content = dumped(data.draw(altered_tree(json.loads(saved[name]))))
    else:
        content = data.draw(altered(saved[name]) | st.binary(max_size=99))
    with raises_only(ArtefactError):
        checkpoint.load(write_files(folder, saved | {name: content}), 3)
        assert content == saved[name]


@fuzz(150, st.data())
def test_a_manifest_with_its_hashes_made_right(folder, saved, data):
    """What nobody wrote but someone made: it may be taken where it says the same, and nothing else comes of it."""
    manifest = manifest_of(saved)
    odd = data.draw(altered_tree(manifest))
    content = sealed(odd) if isinstance(odd, dict) else dumped(odd)
    with raises_only(ArtefactError):
        checkpoint.load(write_files(folder, saved | {"manifest.json": content}), 3)
        assert {key: odd.get(key) for key in manifest} == manifest


@st.composite
def altered_safetensors(draw, data):
    """Another length of the header, another header, or other bytes."""
    length = int.from_bytes(data[:8], "little")
    match draw(st.sampled_from(["length", "header", "bytes"])):
        case "length":
            lengths = [0, 1, length - 1, length + 1, 1 << 20, 100 << 20, 1 << 40, 1 << 63, (1 << 64) - 1]
            odd = draw(st.sampled_from(lengths))
            return odd.to_bytes(8, "little") + data[8:]
        case "header":
            header = json.dumps(draw(altered_tree(json.loads(data[8 : 8 + length])))).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + length :]
        case _:
            return draw(altered(data))


@fuzz(150, st.data())
def test_tensors_with_their_hashes_made_right(folder, saved, data):
    content = data.draw(altered_safetensors(saved["model.safetensors"]))
    manifest = manifest_of(saved)
    manifest["files"]["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = saved | {"model.safetensors": content, "manifest.json": sealed(manifest)}
    with raises_only(ArtefactError):
        found = checkpoint.load(write_files(folder, files), 3)
        for tensor in found.model.values():  # each of its elements is there
            assert len(tensor.contiguous().flatten().view(torch.uint8)) == tensor.numel() * tensor.element_size()


# tokenizers

CORPUS = ["나는 이불을 뒤집어 쓰고", "hello <eos> world", "the cat  sat\té 🎉", "<pad> <unk> aaaaaaaaaaaaaaaa 12 -3"]
OWN = {kind: train_tokenizer(kind, CORPUS, vocab_size=300, min_frequency=1) for kind in ("char", "word", "ids", "bpe")}


def check_tokenizer(make):
    """It is refused, or encodes into its own ids and back, or refuses the text."""
    with raises_only(ArtefactError):
        tokenizer = make()
        texts = ["3 5 7", "", "12"] if tokenizer.kind == "ids" else [*CORPUS, ""]
        try:
            flat, lengths = tokenizer.encode_texts(texts)
        except DataError:
            assert tokenizer.kind == "ids"
            return
        assert len(lengths) == len(texts)
        assert lengths.sum() == len(flat)
        assert not len(flat) or 0 <= flat.min() <= flat.max() < tokenizer.vocab_size
        assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} <= set(range(tokenizer.vocab_size))
        assert tokenizer.unk_id is None or 0 <= tokenizer.unk_id < tokenizer.vocab_size
        tokenizer.decode(flat.tolist()).encode()
        again = parse_tokenizer(tokenizer.dumps())
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode_texts(texts)[0].tolist() == flat.tolist()


@pytest.mark.parametrize("kind", OWN)
@fuzz(80, st.data())
def test_an_altered_tokenizer_of_ours(kind, data):
    content = data.draw(altered_json(json.loads(OWN[kind].dumps())))
    check_tokenizer(lambda: parse_tokenizer(content.decode(errors="replace")))


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "kind": "ids", "ids": 1e999, "pad_id": 0}',
        '{"format": 1, "kind": "ids", "ids": 9, "pad_id": Infinity}',
    ],
)
def test_an_infinite_number_is_no_tokenizer(content):
    with pytest.raises(ArtefactError):
        parse_tokenizer(content)


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


PATTERNS = [{"Regex": "a*"}, {"Regex": "(a+a+)+b"}, {"Regex": "("}, {"Regex": ""}, {"String": ""}, {"String": "a"}]
REPLACE = [{"type": "Replace", "pattern": pattern, "content": content} for pattern in PATTERNS for content in ("", "a")]
NORMALIZERS = [
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Nmt", "ByteLevel")),
    {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Prepend", "prepend": ""}, {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="},
    {"type": "Precompiled", "precompiled_charsmap": ""}, {"type": "Sequence", "normalizers": []},
    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(range(64))).decode()},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
     "lowercase": True}, *REPLACE,
]  # fmt: skip
PRE_TOKENIZERS = [
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
    {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Removed"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "first", "split": False},
    {"type": "CharDelimiterSplit", "delimiter": " "}, {"type": "FixedLength", "length": 0},
    {"type": "FixedLength", "length": 3}, {"type": "Sequence", "pretokenizers": []}, *map(split, PATTERNS),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
]  # fmt: skip
DECODERS = [
    *({"type": kind} for kind in ("ByteLevel", "ByteFallback", "Fuse")), *REPLACE,
    {"type": "WordPiece", "prefix": "", "cleanup": True}, {"type": "BPEDecoder", "suffix": ""},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
    {"type": "Strip", "content": "a", "start": 9, "stop": 9}, {"type": "Strip", "content": "h", "start": 1, "stop": 0},
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
]  # fmt: skip
MODELS = [
    {"type": "WordLevel", "vocab": {"hello": 0, "<unk>": 1}, "unk_token": "<unk>"},
    {"type": "WordLevel", "vocab": {"hello": 0}, "unk_token": "none"},
    {"type": "WordLevel", "vocab": {}, "unk_token": ""},
    {"type": "WordPiece", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 100},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "x", "continuing_subword_prefix": "",
     "max_input_chars_per_word": 0},
    {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0, "byte_fallback": False},
    {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None, "byte_fallback": True},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]], "unk_token": "x", "byte_fallback": True,
     "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
     "ignore_merges": True},
]  # fmt: skip
ADDED = {"content": "cat", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}
OTHERS = {
    "normalizer": NORMALIZERS,
    "pre_tokenizer": PRE_TOKENIZERS,
    "decoder": DECODERS,
    "model": MODELS,
    "added_tokens": [[], [{"id": 0, **ADDED}], [{"id": 7000, **ADDED}], [{"id": 0, **ADDED, "content": ""}]],
    "post_processor": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}],
    "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}],
    "padding": [{"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": ""}],
}  # fmt: skip
LIBRARY = OWN["bpe"].state()["tokenizer"]


@st.composite
def altered_library(draw):
    """A tokenizer.json of the library with some of its parts replaced by others, and these altered."""
    tree = dict(LIBRARY)
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(list(OTHERS)))
        other = draw(st.sampled_from(OTHERS[part]))
        tree[part] = draw(st.just(other) | st.none() | altered_tree(other))
    return json.dumps(tree)


def from_file(content):
    return SubwordTokenizer(content, name="theirs.json")


@fuzz(150, altered_library())
def test_an_altered_tokenizer_of_the_library(content):
    check_tokenizer(lambda: from_file(content))


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}),
        ("normalizer", {"type": "Prepend", "prepend": ""}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "a"}),
        ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        ("decoder", {"type": "Strip", "content": "a", "start": 9, "stop": 9}),
    ],
)
def test_a_part_that_panics_its_library(part, odd):
    check_tokenizer(lambda: from_file(json.dumps(LIBRARY | {part: odd})))
