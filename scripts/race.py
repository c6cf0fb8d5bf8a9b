"""How much sooner lmtrain has the perplexity that PyTorch's `word_language_model` example reaches on the same text.

    git clone https://github.com/pytorch/examples
    python scripts/race.py examples/word_language_model [--corpus FOLDER] [--minutes 10] [KEY=VALUE]...

The example runs with its defaults (LSTM 2x200) and `--tied`, until the first epoch that ends after `--minutes`: only
then does it say what it has reached. Its lowest validation perplexity up to there is the mark, and the seconds from the
start of its command are the time to beat. Then `lmtrain train` runs the recipe for a twelfth of that time, a tenth, an
eighth and so on, each time a whole command with imports, tokenising, counting and the validation at its end, until one
has the mark. The result is the example's time over the time of that command.

Both score every word and line end of the same validation file, `<unk>` included. `KEY=VALUE` overrides keys of the
recipe; without n-grams and recent tokens: `model.ngram_counts=null model.recent_tokens=null`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPOCH = re.compile(r"end of epoch\s+\d+ .* valid ppl\s+([\d.]+)")
PARTS = (12, 10, 8, 7, 6, 5, 4, 3, 2, 1)  # lmtrain's budgets, as parts of the example's time
LEAST_S = 5.0  # lmtrain trains at least so long


def race_of_example(folder: Path, corpus: Path, minutes: float) -> tuple[float, float]:
    """The example's lowest validation perplexity when its first epoch after `minutes` has ended, and the seconds."""
    start_s, lowest = time.monotonic(), float("inf")
    command = [sys.executable, "-u", folder.resolve() / "main.py", "--data", corpus.resolve(), "--tied"]
    with (
        tempfile.TemporaryDirectory() as scratch,  # it saves its model where it runs
        subprocess.Popen(command, cwd=scratch, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if found := EPOCH.search(line):
                lowest, taken_s = min(lowest, float(found[1])), time.monotonic() - start_s
                print(f"example: perplexity {lowest:.2f} after {taken_s:.0f} s", flush=True)
                if taken_s >= 60 * minutes:
                    process.terminate()
                    return lowest, taken_s
    raise SystemExit(f"{folder}/main.py ended before {minutes:g} minutes had passed")


def run_of_lmtrain(recipe: Path, corpus: Path, budget_s: float, overrides: Sequence[str]) -> tuple[float, float, float]:
    """Train for about `budget_s` seconds in all; return validation perplexity, seconds of the command, and those of
    them that were not steps: start and validation."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = [f"data.{part}={corpus.resolve() / part}.txt" for part in ("train", "valid", "test")]
        places = [f"runs_dir={scratch}", "name=race", f"data.cache_dir={scratch}/cache"]
        limit = f"training.max_minutes={budget_s / 60}"
        command = [sys.executable, "-m", "lmtrain", "train", str(recipe), *texts, *places, *overrides, limit]
        start_s = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, text=True)
        taken_s = time.monotonic() - start_s
        metrics = Path(scratch, "race", "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in metrics.splitlines()]
    perplexity = min(row["valid/perplexity"] for row in rows if "valid/perplexity" in row)
    return perplexity, taken_s, taken_s - budget_s


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", type=Path, help="the example's folder in a checkout")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--corpus", type=Path, default=ROOT / "../shared/data/wikitext2", help="of three .txt files")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/recipes/wikitext2-20min.yaml")
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_intermixed_args(arguments)  # overrides may follow options
    mark, time_s = race_of_example(given.example, given.corpus, given.minutes)
    other_s = 0.0  # start and validation, as the run before had them
    for part in PARTS:
        budget_s = max(LEAST_S, time_s / part - other_s)
        perplexity, taken_s, other_s = run_of_lmtrain(given.recipe, given.corpus, budget_s, given.overrides)
        print(
            f"lmtrain: perplexity {perplexity:.2f} after {taken_s:.0f} s, {other_s:.0f} s of them start and validation"
        )
        if perplexity <= mark:
            print(f"{mark:.2f} is reached {time_s / taken_s:.1f} times sooner")
            return 0
    print(f"{mark:.2f} is not reached in the example's time")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
