"""How much faster several processes train than one, and how long they wait for each other.

    python scripts/scaling.py

Each process has one core. One and several take turns on two synthetic corpora with equally many words, one of short
sentences and one of long ones; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CORPORA = {"short": (2, 14), "long": (20, 140)}  # words in a sentence, from, to
VOCABULARY = 4000
CONFIG = """
data: {{train: {name}.txt, cache_dir: cache}}
tokenizer: {{kind: word, vocab_size: {vocabulary}, min_frequency: 1}}
batching: {{max_tokens: {tokens}}}
model: {{embedding_size: 256, hidden_size: {hidden}, num_layers: 2, dropout: 0.2}}
training: {{max_steps: {steps}, precision: fp32, num_threads: 1}}
checkpoint: {{every_steps: null, every_minutes: null}}
logging: {{every_steps: {window}, sample_prompts: []}}
"""


def write_corpus(path: Path, words: int, shortest: int, longest: int) -> None:
    """Sentences of words by Zipf's law; the same ones at each call."""
    random = np.random.default_rng(1)
    drawn = random.zipf(1.3, words) % VOCABULARY
    ends = random.integers(shortest, longest + 1, words // shortest).cumsum()
    lines = np.split(drawn, ends[ends < words])
    path.write_text("".join(" ".join(map("w{}".format, line)) + "\n" for line in lines if len(line)), encoding="utf-8")


def train(directory: Path, name: str, processes: int, run: str) -> tuple[float, float]:
    """Tokens a second and the share of the time that ranks waited for each other, medians over the logged windows."""
    start = [] if processes == 1 else ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    cores = sorted(os.sched_getaffinity(0))[:processes]
    subprocess.run(
        [sys.executable, "-m", *start, "lmtrain", "train", f"{name}.yaml", "--run-dir", run],
        cwd=directory,
        check=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    rows = [json.loads(line) for line in (directory / run / "metrics.jsonl").read_text().splitlines()]
    windows = [row for row in rows if "train/loss" in row][1:]  # the first one warms up
    speed = statistics.median(row["train/tokens_per_second"] for row in windows)
    return speed, statistics.fmean(row.get("train/rank_wait_fraction", 0.0) for row in windows)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch, over all processes, with padding")
    settings = parser.parse_args()
    print("| corpus | 1 process, tokens/s | of several, tokens/s | ratio | waiting |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for name, (shortest, longest) in CORPORA.items():
            write_corpus(directory / f"{name}.txt", 400_000, shortest, longest)
            values = {**vars(settings), "name": name, "vocabulary": VOCABULARY, "window": max(1, settings.steps // 8)}
            (directory / f"{name}.yaml").write_text(CONFIG.format(**values))
            turns = [
                [train(directory, name, count, f"{name}-{turn}-{count}") for count in (1, settings.processes)]
                for turn in range(settings.turns)
            ]
            alone, together = (statistics.median(turn[k][0] for turn in turns) for k in (0, 1))
            ratio = statistics.median(turn[1][0] / turn[0][0] for turn in turns)
            waited = statistics.median(turn[1][1] for turn in turns)
            print(f"| {name} | {alone:,.0f} | {together:,.0f} | {ratio:.2f} | {waited:.1%} |", flush=True)


if __name__ == "__main__":
    main()
