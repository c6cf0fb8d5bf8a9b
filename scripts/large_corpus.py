"""Prepare a corpus that is made up here, as large as you like, and say how fast that went and what memory it took.

    python scripts/large_corpus.py --gigabytes 4 --kinds word char bpe --formats text csv parquet --directory /tmp/large

Words follow Zipf's law down to rank 10,000, fall off faster behind it as in real text, and one in a hundred is new.
Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LETTERS = np.frombuffer(b"etaoinshrdlcumwfgypbvkjxqz", np.uint8)
FILES = 4
PACKED = 16  # one of this number of parts is in the last file, a .gz
CHOICES = 1 << 21  # words that blocks are drawn from
BLOCK_WORDS = 1 << 19
FORMATS = ["text", "csv", "jsonl", "paragraph", "parquet"]
ROOT = Path(__file__).parent.parent

CONFIG = """
data: {{train: 'part-*', valid: held_out.txt, separator: {separator}, cache_dir: cache}}
tokenizer: {{kind: {kind}, vocab_size: 30000}}
model: {{embedding_size: 16, hidden_size: 16, num_layers: 1}}
training: {{max_steps: 2, device: cpu, precision: fp32}}
logging: {{every_steps: 1, sample_prompts: []}}
"""


def made_up(count: int, low: int, high: int, chance: np.random.Generator) -> NDArray[np.uint64]:
    """Words of `low` to `high` letters and a space behind each, in eight bytes; NULs are left out in the end."""
    letters = LETTERS[(chance.random((count, 8)) ** 2 * 26).astype(np.int64)]
    letters[np.arange(8) >= chance.integers(low, high + 1, count)[:, None]] = 0
    letters[:, 7] = ord(" ")
    return letters.reshape(-1).view(np.uint64)


def choices(chance: np.random.Generator) -> NDArray[np.uint64]:
    """Words as often as they occur; every fortieth is Korean."""
    kinds = [made_up(300, 1, 4, chance), made_up(20000, 3, 7, chance), made_up(1_000_000, 5, 7, chance)]
    words = np.concatenate(kinds)
    syllables = "".join(map(chr, chance.integers(0xAC00, 0xD7A4, 2000).tolist())).encode()
    korean = np.zeros((1000, 8), np.uint8)
    korean[:, :6], korean[:, 7] = np.frombuffer(syllables, np.uint8).reshape(1000, 6), ord(" ")
    words[300:40300:40] = korean.reshape(-1).view(np.uint64)
    ranks = np.arange(1, len(words) + 1)
    share = 1 / ranks * np.minimum(1, (ranks / 10000) ** -0.7)
    return words[np.searchsorted(share.cumsum() / share.sum(), chance.random(CHOICES)).clip(max=len(words) - 1)]


def blocks(seed: int) -> Iterator[bytes]:
    """Lines of 1 to 40 words, without end."""
    chance = np.random.Generator(np.random.PCG64(seed))
    drawn = choices(np.random.Generator(np.random.PCG64(0)))
    while True:
        words = drawn[chance.integers(0, CHOICES, BLOCK_WORDS, np.uint32)]
        words[chance.integers(0, BLOCK_WORDS, BLOCK_WORDS // 100)] = made_up(BLOCK_WORDS // 100, 6, 7, chance)
        ends = chance.integers(1, 41, BLOCK_WORDS // 20).cumsum()
        flat = words.view(np.uint8)
        flat[8 * ends[ends < BLOCK_WORDS] - 1] = ord("\n")
        flat[-1] = ord("\n")
        yield flat[flat != 0].tobytes()


def in_format(lines: bytes, form: str) -> bytes:
    """The same texts as rows of a CSV, JSON lines, or paragraphs of two lines."""
    if form == "csv":
        return b'7,"' + lines[:-1].replace(b"\n", b'",calm\n7,"') + b'",calm\n'
    if form == "jsonl":
        return b'{"id": 7, "text": "' + lines[:-1].replace(b"\n", b'"}\n{"id": 7, "text": "') + b'"}\n'
    parts = lines[:-1].split(b"\n")
    return b"".join(b"\n".join(parts[place : place + 2]) + b"\n\n" for place in range(0, len(parts), 2))


def make_parquet(path: Path, size: int) -> None:
    """The same texts as a Parquet file of row groups of half a million rows."""
    import pyarrow
    from pyarrow import parquet

    schema, rows, done = pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())]), list[str](), 0
    with parquet.ParquetWriter(path, schema, compression="snappy") as writer:
        for block in blocks(1):
            rows += block.decode().splitlines()
            done += len(block)
            if len(rows) > 500_000 or done >= size:
                writer.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}, schema))
                rows = []
            if done >= size:
                return


def make(directory: Path, size: int, form: str) -> None:
    """The files of a corpus of this number of bytes, unpacked, and a few lines held out."""
    (directory / "held_out.txt").write_bytes(next(blocks(99))[: 1 << 16].rpartition(b"\n")[0])
    if form == "parquet":
        make_parquet(directory / "part-0.parquet", size)
        return
    if form != "text":
        with open(directory / f"part-0.{'txt' if form == 'paragraph' else form}", "wb") as handle:
            handle.write(b"id,text,label\n" if form == "csv" else b"")
            for block in blocks(1):
                handle.write(in_format(block, form))
                if handle.tell() >= size:
                    return
    for number in range(FILES):
        packed = number == FILES - 1
        share, done = size // PACKED if packed else (size - size // PACKED) // (FILES - 1), 0
        path = directory / f"part-{number}.txt{'.gz' if packed else ''}"
        with gzip.open(path, "wb", compresslevel=1) if packed else open(path, "wb") as handle:
            for block in blocks(number + 1):
                handle.write(block)
                done += len(block)
                if done >= share:
                    break


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text(encoding="utf-8").split())
    return found


def held_bytes(pid: int) -> int:
    """Memory of a process and its children: what several share is counted in parts."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="utf-8")
            total += sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)) << 10
    return total


def watched(*command: str, directory: Path) -> tuple[str, float, int]:
    """Run lmtrain: what it said on both outputs, its seconds, and the most memory of all its processes together."""
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start_s, peak = time.monotonic(), 0
        process = subprocess.Popen(
            [sys.executable, "-m", "lmtrain", *command],
            cwd=directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | paths,
        )
        while process.poll() is None:
            peak = max(peak, held_bytes(process.pid))
            time.sleep(0.05)
        took_s = time.monotonic() - start_s
        output.seek(0)
        said = output.read()
    if process.returncode:
        sys.exit(f"lmtrain {' '.join(command)}: {process.returncode}\n{said}")
    return said, took_s, peak


FIRST_BATCH = """
import sys, time
start_s = time.monotonic()
from lmtrain.config import load_config
from lmtrain.data.batches.loader import BatchLoader, training_batches
from lmtrain.data.preparation import prepare
config = load_config(sys.argv[1])
corpora = prepare(config, print)
batches = training_batches(config, corpora.train, corpora.tokenizer.eos_id)
loader = BatchLoader(batches, corpora.tokenizer.pad_id, 1)
loader.peek()
print(f"{time.monotonic() - start_s:.1f} s")
loader.close()
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--gigabytes", type=float, default=4.0)
    arguments.add_argument("--kinds", nargs="+", default=["word", "char", "bpe"])
    arguments.add_argument("--formats", nargs="+", default=["text"], choices=FORMATS)
    arguments.add_argument("--directory", default=None, help="where to work; default: the system's")
    given = arguments.parse_args()
    if given.directory is not None:
        Path(given.directory).mkdir(parents=True, exist_ok=True)
    for form in given.formats:
        directory = Path(tempfile.mkdtemp(prefix="lmtrain-large-", dir=given.directory))
        try:
            measure(directory, form, int(given.gigabytes * 1e9), given.kinds)
        finally:
            shutil.rmtree(directory)


def measure(directory: Path, form: str, size: int, kinds: list[str]) -> None:
    """Make a corpus in a directory, prepare it with each kind of tokenizer, and print what that took."""
    start_s, cores = time.monotonic(), len(os.sched_getaffinity(0))
    make(directory, size, form)
    print(f"made {size / 1e6:,.0f} MB of {form}: {size / 1e6 / (time.monotonic() - start_s):.0f} MB/s")
    time.sleep(3)  # so that their digests can be remembered
    for kind in kinds:
        separator = "paragraph" if form == "paragraph" else "line"
        (directory / "config.yaml").write_text(CONFIG.format(kind=kind, separator=separator))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said, took_s, peak = watched("prepare", "config.yaml", directory=directory)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rate, load = size / 1e6 / took_s, os.getloadavg()[0]
        print(f"{kind}: {took_s:,.0f} s, {rate:.1f} MB/s, {rate / cores:.1f} MB/s a core", end="")
        print(f" (by processor time {size / 1e6 / busy_s:.1f}; load {load:.1f} on {cores} cores)", end="")
        print(f", {peak / 1e6:,.0f} MB in all processes at most")
        print("    " + said.strip().replace("\n", "\n    "))
        first = subprocess.run(
            [sys.executable, "-c", FIRST_BATCH, "config.yaml"],
            cwd=directory,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        print(f"    first batch once prepared, imports counted: {first.stdout.strip()}{first.stderr}", flush=True)
        shutil.rmtree(directory / "cache")


if __name__ == "__main__":
    main()
