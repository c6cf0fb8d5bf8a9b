"""Text and ids that can't be read: the fault at its place, exit 3; and what is odd, but of use."""

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lmtrain.data.store.token_store import TokenStore
from tests.conftest import NO_FILE, ROOT
from tests.stories.bad_inputs.table import IDS, LONGEST_S, MOST_BYTES, both, fifo, folder, link, sparse, text

WORDS = ""
BYTES = "tokenizer.kind=byte"
STREAM = "tokenizer.kind=byte batching.mode=stream model.bidirectional=false"
SUBWORDS = "tokenizer.kind=bpe tokenizer.vocab_size=300"
JSONL = "data.train=t.jsonl"
PACKED = gzip.compress(b"a b c\n" * 1000, mtime=0)


def train(content):
    return text("train.txt", content)


def swap(make):
    """What is made stands in the training text's place."""
    return both(lambda: os.remove("train.txt"), make)


def listen():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("train.txt")


# what stands there, the overrides, stderr of `check`, stderr of `train`
FAULTS = {
    "empty": (
        train(""),
        WORDS,
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
    ),
    "empty, of bytes": (
        train(""),
        BYTES,
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
    ),
    "empty, of subwords": (
        train(""),
        SUBWORDS,
        (
            "learning the bpe vocabulary from train.txt\n"
            "reading train.txt\n"
            "train.txt: no text: nothing but 0 blank lines"
        ),
        (
            "learning the bpe vocabulary from train.txt\n"
            "reading train.txt\n"
            "train.txt: no text: nothing but 0 blank lines"
        ),
    ),
    "empty, a stream": (
        train(""),
        STREAM,
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
    ),
    "empty, of ids": (
        train(""),
        IDS,
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
        ("reading train.txt\ntrain.txt: no text: nothing but 0 blank lines"),
    ),
    "blank lines": (
        train("\n \n\t\n"),
        WORDS,
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
    ),
    "blank lines, of bytes": (
        train("\n\n"),
        BYTES,
        ("reading train.txt\ntrain.txt: no text: nothing but 2 blank lines"),
        ("reading train.txt\ntrain.txt: no text: nothing but 2 blank lines"),
    ),
    "a BOM alone": (
        train(b"\xef\xbb\xbf"),
        WORDS,
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 1 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
    ),
    "no word often enough": (
        train("a b\n"),
        "tokenizer.min_frequency=2",
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 2 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt: no token occurs 2 times or more: there is no vocabulary to learn "
            "(tokenizer.min_frequency)"
        ),
    ),
    "nothing left to train on": (
        train("a\n"),
        "data.valid=null data.valid_fraction=0.999 tokenizer.kind=byte",
        ("reading train.txt\ntrain.txt: data.valid_fraction 0.999 leaves the train part without a text"),
        ("reading train.txt\ntrain.txt: data.valid_fraction 0.999 leaves the train part without a text"),
    ),
    "bad UTF-8": (
        train(b"fine\n\xff\n"),
        WORDS,
        "train.txt:2:1: not UTF-8 (byte {words}",
        ("learning the word vocabulary from train.txt\ntrain.txt:2:1: not UTF-8 (byte {words}"),
    ),
    "bad UTF-8, of bytes": (
        train(b"fine\n\xff\n"),
        BYTES,
        "train.txt:2:1: not UTF-8 (byte {words}",
        ("reading train.txt\ntrain.txt:2:1: not UTF-8 (byte {words}"),
    ),
    "bad UTF-8 behind a BOM": (
        train(b"\xef\xbb\xbffine\nb\xc3\n"),
        WORDS,
        "train.txt:2:2: not UTF-8 (byte {words}",
        ("learning the word vocabulary from train.txt\ntrain.txt:2:2: not UTF-8 (byte {words}"),
    ),
    "UTF-16 cut within a character": (
        train("a b\n".encode("utf-16")[:-1]),
        WORDS,
        "train.txt:1: not utf-16 (byte 0x0a); it is damaged",
        "learning the word vocabulary from train.txt\ntrain.txt:1: not utf-16 (byte 0x0a); it is damaged",
    ),
    "half a surrogate pair": (
        train(b"a \xed\xa0\x80\n"),
        WORDS,
        "train.txt:1:3: not UTF-8 (byte {words}",
        ("learning the word vocabulary from train.txt\ntrain.txt:1:3: not UTF-8 (byte {words}"),
    ),
    "cut within a character": (
        train("a\n가".encode()[:-1]),
        WORDS,
        "train.txt:2:1: not UTF-8 (byte {words}",
        ("learning the word vocabulary from train.txt\ntrain.txt:2:1: not UTF-8 (byte {words}"),
    ),
    "NUL": (
        train("fine\na\0\n"),
        WORDS,
        "train.txt:2:2: a NUL character; is this a text file? (data.encoding)",
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt:2:2: a NUL character; is this a text file? (data.encoding)"
        ),
    ),
    "NULs": (
        swap(sparse("train.txt", 4096)),
        WORDS,
        "train.txt:1:1: a NUL character; is this a text file? (data.encoding)",
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt:1:1: a NUL character; is this a text file? (data.encoding)"
        ),
    ),
    "a line of 17 MiB": (
        train("x" * (17 << 20)),
        WORDS,
        "train.txt:1: a line of more than 16 MiB; cut it into several, or read the text with batching.mode: stream",
        (
            "learning the word vocabulary from train.txt\n"
            "train.txt:1: a line of more than 16 MiB; cut it into several, or read the text with batching.mode: stream"
        ),
    ),
    "directory": (
        swap(folder("train.txt")),
        WORDS,
        "train.txt: no file below this directory has a known suffix {words}",
        "train.txt: no file below this directory has a known suffix {words}",
    ),
    "FIFO": (swap(fifo("train.txt")), WORDS, "train.txt: not a regular file", "train.txt: not a regular file"),
    "socket": (swap(listen), WORDS, "train.txt: not a regular file", "train.txt: not a regular file"),
    "device": (train(""), "data.train=/dev/zero", "/dev/zero: not a regular file", "/dev/zero: not a regular file"),
    "dangling link": (
        swap(link("train.txt", "nowhere")),
        WORDS,
        f"train.txt: {NO_FILE} (the link points nowhere)",
        f"train.txt: {NO_FILE} (the link points nowhere)",
    ),
    "link to itself": (
        swap(link("train.txt", "train.txt")),
        WORDS,
        "train.txt: too many levels of symbolic links (the link points nowhere)",
        "train.txt: too many levels of symbolic links (the link points nowhere)",
    ),
    "ESC in its name": (
        text("a\x1b[2J.txt", b"\xff"),
        "'data.train=[\"a\\e[2J.txt\"]'",
        "a\\x1b[2J.txt:1:1: not UTF-8 (byte {words}",
        ("learning the word vocabulary from a\\x1b[2J.txt\na\\x1b[2J.txt:1:1: not UTF-8 (byte {words}"),
    ),
    "newline in its name": (
        text("a\nb.txt", b"\xff"),
        "'data.train=[\"a\\nb.txt\"]'",
        "a\\x0ab.txt:1:1: not UTF-8 (byte {words}",
        ("learning the word vocabulary from a\nb.txt\na\\x0ab.txt:1:1: not UTF-8 (byte {words}"),
    ),
    "no gzip": (
        text("t.gz", "a b\n"),
        "data.train=t.gz",
        "t.gz: broken gzip file: Not a gzipped file (b'a ')",
        ("t.gz: broken gzip file: Not a gzipped file (b'a ')"),
    ),
    "gzip cut short": (
        text("t.gz", PACKED[:30]),
        "data.train=t.gz",
        ("t.gz: broken gzip file: Compressed file ended before the end-of-stream marker was reached"),
        ("t.gz: broken gzip file: Compressed file ended before the end-of-stream marker was reached"),
    ),
    "gzip cut within its sum": (
        text("t.gz", PACKED[:-3]),
        "data.train=t.gz",
        ("t.gz: broken gzip file: Compressed file ended before the end-of-stream marker was reached"),
        ("t.gz: broken gzip file: Compressed file ended before the end-of-stream marker was reached"),
    ),
    "gzip with a flipped bit": (
        text("t.gz", PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:]),
        "data.train=t.gz",
        "t.gz: broken gzip file: CRC check failed 0xeaa6cf01 != 0xeaa6cf00",
        ("t.gz: broken gzip file: CRC check failed 0xeaa6cf01 != 0xeaa6cf00"),
    ),
    "gzip with something behind": (
        text("t.gz", PACKED + b"more"),
        "data.train=t.gz",
        "t.gz: broken gzip file: Not a gzipped file (b'mo')",
        ("t.gz: broken gzip file: Not a gzipped file (b'mo')"),
    ),
    "bad UTF-8 in gzip": (
        text("t.gz", gzip.compress(b"a\n\xff\n")),
        "data.train=t.gz",
        "t.gz:2:1: not UTF-8 (byte {words}",
        ("learning the word vocabulary from t.gz\nt.gz:2:1: not UTF-8 (byte {words}"),
    ),
    "no JSON": (
        text("t.jsonl", '{"text": "a"}\n{"text": ]\n'),
        JSONL,
        "t.jsonl:2:10: not JSON: Expecting value",
        ("learning the word vocabulary from t.jsonl\nt.jsonl:2:10: not JSON: Expecting value"),
    ),
    "no such field": (
        text("t.jsonl", '{"txt": "a", "id": 3}\n'),
        f"{JSONL} data.field=body",
        "t.jsonl:1: no field 'body' (set data.field); it has 'txt', 'id'",
        ("t.jsonl:1: no field 'body' (set data.field); it has 'txt', 'id'"),
    ),
    "a field with ESC and a newline": (
        text("t.jsonl", '{"\\u001b[2J\\n": "a"}\n'),
        f"{JSONL} data.field=body",
        "t.jsonl:1: no field 'body' (set data.field); it has '\\x1b[2J\\n'",
        ("t.jsonl:1: no field 'body' (set data.field); it has '\\x1b[2J\\n'"),
    ),
    "a number for text": (
        text("t.jsonl", '{"text": 3}\n'),
        JSONL,
        "t.jsonl:1: not an object whose field 'text' is text",
        ("learning the word vocabulary from t.jsonl\nt.jsonl:1: not an object whose field 'text' is text"),
    ),
    "a list for a record": (
        text("t.jsonl", "[1]\n"),
        JSONL,
        "t.jsonl:1: an array, not a record; data.format: json reads a file that is one array",
        "learning the word vocabulary from t.jsonl\n"
        "t.jsonl:1: an array, not a record; data.format: json reads a file that is one array",
    ),
    "a number for a record": (
        text("t.jsonl", "3\n"),
        JSONL,
        "t.jsonl:1: neither a text nor an object whose field 'text' is text",
        "learning the word vocabulary from t.jsonl\nt.jsonl:1: neither a text nor an object whose field 'text' is text",
    ),
    "NUL in a field": (
        text("t.jsonl", '{"text": "a\\u0000"}\n'),
        JSONL,
        "t.jsonl:1: a NUL character in field 'text'",
        ("learning the word vocabulary from t.jsonl\nt.jsonl:1: a NUL character in field 'text'"),
    ),
    "JSON 100,000 deep": (
        text("t.jsonl", "[" * 100_000 + "\n"),
        JSONL,
        "t.jsonl:1: {words}nested too deep, or a number too long",
        ("learning the word vocabulary from t.jsonl\nt.jsonl:1: {words}nested too deep, or a number too long"),
    ),
    "a 5,000-digit number": (
        text("t.jsonl", '{"text": ' + "9" * 5000 + "}\n"),
        JSONL,
        "t.jsonl:1: {words}nested too deep, or a number too long",
        ("learning the word vocabulary from t.jsonl\nt.jsonl:1: {words}nested too deep, or a number too long"),
    ),
    "negative id": (
        train("1 2\n-3\n"),
        IDS,
        "train.txt:2:1: id -3 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
        ("reading train.txt\ntrain.txt:2:1: id -3 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
    ),
    "id of the vocabulary's size": (
        train("1 2 9\n"),
        IDS,
        "train.txt:1:5: id 9 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
        ("reading train.txt\ntrain.txt:1:5: id 9 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
    ),
    "2^70": (
        train(f"1\n\n 2 {2**70}\n"),
        IDS,
        ("train.txt:3:4: id 1180591620717411303424 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
        (
            "reading train.txt\n"
            "train.txt:3:4: id 1180591620717411303424 is not in 0..8; raise tokenizer.vocab_size if "
            "it belongs there"
        ),
    ),
    "a 5,000-digit id": (
        train("9" * 5000 + "\n"),
        IDS,
        (
            "train.txt:1:1: id 9999999999999999999999999999999999999999 is not in 0..8; raise "
            "tokenizer.vocab_size if it belongs there"
        ),
        (
            "reading train.txt\n"
            "train.txt:1:1: id 9999999999999999999999999999999999999999 is not in 0..8; raise "
            "tokenizer.vocab_size if it belongs there"
        ),
    ),
    "an id that would wrap in 16 bits": (
        train(f"1 {(1 << 16) + 5}\n"),
        IDS,
        "train.txt:1:3: id 65541 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
        ("reading train.txt\ntrain.txt:1:3: id 65541 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
    ),
    "an id that would wrap in 32 bits": (
        train(f"1 {(1 << 32) + 5}\n"),
        IDS,
        ("train.txt:1:3: id 4294967301 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
        (
            "reading train.txt\n"
            "train.txt:1:3: id 4294967301 is not in 0..8; raise tokenizer.vocab_size if it belongs "
            "there"
        ),
    ),
    "the pad id": (
        train("1 0 2\n"),
        IDS,
        "train.txt:1:3: id 0 is the pad id; set tokenizer.pad_id to an id that never occurs",
        ("reading train.txt\ntrain.txt:1:3: id 0 is the pad id; set tokenizer.pad_id to an id that never occurs"),
    ),
    "a pad id of the user's": (
        train("1 0 5\n"),
        IDS + " tokenizer.pad_id=5",
        "train.txt:1:5: id 5 is the pad id; set tokenizer.pad_id to an id that never occurs",
        ("reading train.txt\ntrain.txt:1:5: id 5 is the pad id; set tokenizer.pad_id to an id that never occurs"),
    ),
    "a word where an id belongs": (
        train("1 2\n3 one\n"),
        IDS,
        "train.txt:2:3: 'one' is not an id; kind ids reads whole numbers between white space",
        ("reading train.txt\ntrain.txt:2:3: 'one' is not an id; kind ids reads whole numbers between white space"),
    ),
    "ESC where an id belongs": (
        train("1 \x1b[2J\n"),
        IDS,
        "train.txt:1:3: '\\x1b[2J' is not an id; kind ids reads whole numbers between white space",
        ("reading train.txt\ntrain.txt:1:3: '\\x1b[2J' is not an id; kind ids reads whole numbers between white space"),
    ),
    "a fraction where an id belongs": (
        train("1 2.0\n"),
        IDS,
        "train.txt:1:3: '2.0' is not an id; kind ids reads whole numbers between white space",
        ("reading train.txt\ntrain.txt:1:3: '2.0' is not an id; kind ids reads whole numbers between white space"),
    ),
    "a sign before an id": (
        train("1 +2\n"),
        IDS,
        "train.txt:1:3: '+2' is not an id; kind ids reads whole numbers between white space",
        ("reading train.txt\ntrain.txt:1:3: '+2' is not an id; kind ids reads whole numbers between white space"),
    ),
    "other digits": (
        train("1 ٣\n"),
        IDS,
        "train.txt:1:3: '٣' is not an id; kind ids reads whole numbers between white space",
        ("reading train.txt\ntrain.txt:1:3: '٣' is not an id; kind ids reads whole numbers between white space"),
    ),
    "bad UTF-8 among ids": (
        train(b"1 \xff\n"),
        IDS,
        "train.txt:1:3: not UTF-8 (byte {words}",
        ("reading train.txt\ntrain.txt:1:3: not UTF-8 (byte {words}"),
    ),
    "fault of the validation text": (
        text("valid.txt", b"\xff\n"),
        WORDS,
        "valid.txt:1:1: not UTF-8 (byte {words}",
        (
            "learning the word vocabulary from train.txt\nreading train.txt\n"
            "reading valid.txt\nvalid.txt:1:1: not UTF-8 (byte {words}"
        ),
    ),
    "empty validation text": (
        text("valid.txt", ""),
        WORDS,
        (
            "learning the word vocabulary from train.txt\nreading train.txt\n"
            "reading valid.txt\nvalid.txt: no text: nothing but 0 blank lines"
        ),
        (
            "learning the word vocabulary from train.txt\nreading train.txt\n"
            "reading valid.txt\nvalid.txt: no text: nothing but 0 blank lines"
        ),
    ),
    "no gzip as validation text": (
        text("v.gz", "x"),
        "data.valid=v.gz",
        "v.gz: broken gzip file: Not a gzipped file (b'x')",
        "v.gz: broken gzip file: Not a gzipped file (b'x')",
    ),
}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", FAULTS)
def test_what_can_not_be_trained_on(desk, judge, command, name):
    make, overrides, checked, trained = FAULTS[name]
    make()
    judge(f"{command} c.yaml {overrides}", checked if command == "check" else trained, 3, left_out=("cache",))


def test_check_names_the_first_fault_of_every_file(desk, judge):
    both(train(b"a\n\xff\n"), text("valid.txt", b"a\0\n"), text("more.txt", b"\xff\n"))()
    judge(
        "check c.yaml 'data.train=[train.txt, more.txt]'",
        "train.txt:2:1: not UTF-8 (byte {words}\n"
        "more.txt:1:1: not UTF-8 (byte {words}\n"
        "valid.txt:1:2: a NUL character; {words}",
        3,
    )


def test_check_looks_at_the_test_set_too(desk, judge):
    folder("test")()
    judge("check c.yaml data.test=test", "test: no file below this directory has a known suffix {words}", 3)


COLUMNS = {
    "tokens": (
        train("ab\n"),
        STREAM,
        "reading train.txt\nreading valid.txt\nbatching.batch_size: 8 columns for 3 tokens are too many",
    ),
    "lines": (
        train("a\nb\n"),
        "batching.carry_state=true model.bidirectional=false",
        (
            "learning the word vocabulary from train.txt\n"
            "reading train.txt\nreading valid.txt\n"
            "note: 60% of the validation tokens are unknown to the vocabulary\n"
            "batching.batch_size: 8 columns for 2 rows are too many"
        ),
    ),
}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", COLUMNS)
def test_more_columns_than_there_is_text(desk, judge, command, name):
    make, overrides, said = COLUMNS[name]
    make()
    judge(f"{command} c.yaml {overrides}", said, 2, left_out=("cache",))


# the run that reads it, what stands in new.txt, stderr
READ = {
    "missing": ("run", lambda: None, "new.txt: no such file"),
    "directory": ("run", folder("new.txt"), "new.txt: no file below this directory has a known suffix {words}"),
    "FIFO": ("run", fifo("new.txt"), "new.txt: not a regular file"),
    "device": ("run", link("new.txt", "/dev/zero"), "new.txt: not a regular file"),
    "dangling link": (
        "run",
        link("new.txt", "nowhere"),
        f"new.txt: {NO_FILE} (the link points nowhere)",
    ),
    "bad UTF-8": (
        "run",
        text("new.txt", b"a\n\xff\n"),
        "new.txt:2:1: not UTF-8 (byte {words}",
    ),
    "NUL": ("run", text("new.txt", "a\na\0\n"), "new.txt:2:2: a NUL character; is this a text file? (data.encoding)"),
    "a line of 17 MiB": (
        "run",
        text("new.txt", "x" * (17 << 20)),
        "new.txt:1: a line of more than 16 MiB; cut it into several, or read the text with batching.mode: stream",
    ),
    "negative id": (
        "ids",
        text("new.txt", "1 2\n3 -3\n"),
        "new.txt:2:3: id -3 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
    ),
    "id of the vocabulary's size": (
        "ids",
        text("new.txt", "1 2\n3 9\n"),
        "new.txt:2:3: id 9 is not in 0..8; raise tokenizer.vocab_size if it belongs there",
    ),
    "2^70": (
        "ids",
        text("new.txt", f"1 2\n\n{2**70}\n"),
        ("new.txt:3:1: id 1180591620717411303424 is not in 0..8; raise tokenizer.vocab_size if it belongs there"),
    ),
    "the pad id": (
        "ids",
        text("new.txt", "1 0\n"),
        "new.txt:1:3: id 0 is the pad id; set tokenizer.pad_id to an id that never occurs",
    ),
    "a word where an id belongs": (
        "ids",
        text("new.txt", "1 2\n3 one\n"),
        "new.txt:2:3: 'one' is not an id; kind ids reads whole numbers between white space",
    ),
}
READERS = {
    "evaluate": "evaluate {} new.txt",
    "worst lines": "evaluate {} new.txt --worst 2",
    "score": "score {} new.txt",
    "embed": "embed {} new.txt -o new.npz",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", READ)
def test_what_a_run_can_not_read(home, judge, reader, name):
    run, make, said = READ[name]
    make()
    judge(READERS[reader].format(run), said, 3)


@pytest.mark.parametrize("blank_lines", [0, 2])
def test_nothing_to_evaluate(home, judge, blank_lines):
    text("new.txt", "\n" * blank_lines)()
    judge("evaluate run new.txt", f"new.txt: no text: nothing but {blank_lines} blank lines", 3)


ALONE = "data.valid=null"
MANY_IDS = "tokenizer.kind=ids tokenizer.vocab_size=70000 logging.sample_prompts=[] data.valid=null"

# what stands there, the overrides, stderr of `check`, its line on the training text
NOTES = {
    "a BOM": (
        train(b"\xef\xbb\xbfa b\nb a\n"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "CRLF": (
        train("a b\r\nb a\r\n"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "no newline at the end": (
        train("a b\nb a"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "blank lines among others": (
        train("\n\na b\n \nb a\n"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        ("train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown, 3 blank lines skipped"),
    ),
    "fewer sequences than a batch": (
        train("a b\n"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 1 sequences, 3 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "a vocabulary of one": (
        train("a\na a\n"),
        ALONE,
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 2 sequences, 5 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "sequences over max_length": (
        train("a b c\na\nc b a\n"),
        f"{ALONE} batching.max_length=2",
        ("learning the word vocabulary from train.txt\nreading train.txt"),
        "train: 3 sequences, 10 tokens with end tokens, longest 3, 0.00% unknown",
    ),
    "a validation set that is the training set": (
        train("a b\nb a\n"),
        "data.valid=train.txt",
        (
            "learning the word vocabulary from train.txt\n"
            "reading train.txt\n"
            "note: 2 of 2 validation sequences are also in the training set"
        ),
        "train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "a line of the validation set": (
        both(train("a b\nb a\n"), text("valid.txt", "b a\na\n")),
        WORDS,
        (
            "learning the word vocabulary from train.txt\n"
            "reading train.txt\n"
            "reading valid.txt\n"
            "note: 1 of 2 validation sequences are also in the training set"
        ),
        "train: 2 sequences, 6 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "mostly unknown words": (
        both(train("a b\n"), text("valid.txt", "a y z\n")),
        WORDS,
        (
            "learning the word vocabulary from train.txt\n"
            "reading train.txt\n"
            "reading valid.txt\n"
            "note: 40% of the validation tokens are unknown to the vocabulary"
        ),
        "train: 1 sequences, 3 tokens with end tokens, longest 2, 0.00% unknown",
    ),
    "an id beyond 16 bits": (
        train("65541 5\n"),
        MANY_IDS,
        "reading train.txt",
        "train: 1 sequences, 3 tokens with end tokens, longest 2, 0.00% unknown",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_odd_but_usable_inputs_are_used_with_a_note(desk, shell, name):
    make, overrides, said, told = NOTES[name]
    make()
    done = shell("check", "c.yaml", *overrides.split())
    assert (done.returncode, done.stderr) == (0, said + "\n")
    assert told in done.stdout.splitlines()
    trained = shell("train", "c.yaml", *overrides.split(), "training.max_steps=2")
    assert trained.returncode == 0
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert [
        line for line in trained.stderr.splitlines() if line.startswith("note: ") and "warm-up" not in line
    ] == notes


def test_an_id_beyond_16_bits_is_stored_as_it_is(desk, shell):
    train("65541 5\n")()
    assert shell("check", "c.yaml", *MANY_IDS.split(), "data.cache_dir=stores").returncode == 0
    (store,) = (path.parent for path in Path("stores").glob("*/tokens.bin"))
    assert TokenStore(store).tokens.tolist() == [70000, 65541, 5, 70001]


# a process of its own, which tells its exit code, its seconds without the start, and its peak of memory
DRIVER = """
import json, sys, time
import lmtrain.check.configuration, lmtrain.training.start
from lmtrain.cli import _run
from tests.stories.bad_inputs.table import peak_bytes
from tests.conftest import ROOT
started_s = time.process_time()
code = _run()
print(json.dumps([code, time.process_time() - started_s, peak_bytes()]))
"""


def drive(command):
    """Exit code, seconds, bytes and stderr of a command."""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *command.split()], capture_output=True, text=True, env=os.environ | paths
    )
    (*printed, figures) = done.stdout.splitlines()
    code, took_s, held_bytes = json.loads(figures)
    return code, took_s, held_bytes, done.stderr, printed


def members(part):
    """A gigabyte of this mebibyte, packed."""
    return text("t.gz", gzip.compress(part) * 1024)


LARGE = {
    "one line of 1 GB": (
        members(b"x" * (1 << 20)),
        "train c.yaml data.train=t.gz",
        "learning the word vocabulary from t.gz\n"
        "t.gz:1: a line of more than 16 MiB; cut it into several, or read the text with batching.mode: stream",
    ),
    "one line of 1 GB, not packed": (
        sparse("t.txt", 1 << 30),
        "check c.yaml data.train=t.txt",
        "t.txt:1: a line of more than 16 MiB; cut it into several, or read the text with batching.mode: stream",
    ),
    "gzip bomb": (
        members(b" " * ((1 << 20) - 1) + b"\n"),
        "check c.yaml data.train=t.gz",
        "t.gz: unpacks to more than 400 times its size; unpack it yourself",
    ),
}


@pytest.fixture(scope="module")
def plain_bytes(trained):
    """The peak of memory of `check` on small, good data."""
    stores = (
        f"data.cache_dir={trained}/cache"  # a relative one would be in whatever directory the tests are started from
    )
    train_text = f"data.train={trained}/train.txt"
    code, _, held_bytes, _, printed = drive(f"check {trained}/c.yaml {train_text} data.valid=null {stores}")
    assert (code, [line.partition(":")[0] for line in printed].count("vocabulary")) == (0, 1)
    return held_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_takes_little_memory_and_time(plain_bytes, desk, name):
    make, command, said = LARGE[name]
    make()
    code, took_s, held_bytes, told, printed = drive(command)
    assert (code, printed, told) == (3, [], said + "\n")
    assert held_bytes - plain_bytes < MOST_BYTES
    assert took_s < LONGEST_S
