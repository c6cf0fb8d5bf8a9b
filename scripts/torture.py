"""Faults on small runs, and a table of how these came through.

python scripts/torture.py --minutes 30      # at random, for a while
python scripts/torture.py                   # each as often as its row says

Every fault is a process killed, stopped, starved of room or memory, or a run directory damaged; every run must end
with the weights, metrics and samples of one that nothing happened to. tests/stories/faults holds the faults
themselves; this continues where the tests stop. It needs strace, and a user who may mount (`unshare -rm` makes one).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests are no package that is installed

import pytest

from tests.stories.faults.faults import FAULTS, Fault
from tests.stories.faults.ground import Field


@dataclass
class Row:
    """How a fault went."""

    tried: int = 0
    survived: int = 0
    lost_steps: int = 0  # that a resume had to do again, at most
    skipped: str = ""


def main() -> int:
    """Try until the time is up; the exit code is 1 where a run did not come through."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="faults at random for so long; left out, each fault in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="numbers of faults, such as 1,2,8")
    settings = parser.parse_args()
    faults = [fault for fault in FAULTS if settings.only is None or fault.number in settings.only.split(",")]
    rows = {fault.number: Row() for fault in faults}
    chance, started_s = random.Random(settings.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        field = Field(Path(directory))
        for fault in _drawn(faults, chance, settings.minutes):
            row = rows[fault.number]
            try:
                lost = fault.once(field, random.Random(chance.random()), row.tried)
            except pytest.skip.Exception as skip:
                row.skipped = str(skip)
                continue
            except AssertionError:
                row.tried += 1
                print(f"fault {fault.number} ({fault.name}), turn {row.tried - 1}:", file=sys.stderr)
                traceback.print_exc()
                continue
            row.tried += 1
            row.survived += 1
            row.lost_steps = max(row.lost_steps, lost)
            field.clear()
        processes = field.processes
    print("| # | fault | tried | survived | steps lost, at most |\n|---|---|---:|---:|---:|")
    for fault in faults:
        row = rows[fault.number]
        counted = f"{row.tried} | {row.survived} | {row.lost_steps}" if row.tried else f"0 | {row.skipped} |"
        print(f"| {fault.number} | {fault.name} | {counted} |")
    tried, survived = sum(row.tried for row in rows.values()), sum(row.survived for row in rows.values())
    minutes = (time.monotonic() - started_s) / 60
    print(f"\n{tried} faults, {survived} survived, {processes} processes started, {minutes:.0f} minutes")
    return int(tried > survived)


def _drawn(faults: list[Fault], chance: random.Random, minutes: float | None) -> Iterator[Fault]:
    """The faults to try: at random until the time is up, or each as often as its row says."""
    if minutes is None:
        yield from (fault for fault in faults for _ in range(fault.times))
        return
    end_s = time.monotonic() + 60 * minutes
    while time.monotonic() < end_s:
        yield chance.choice(faults)


if __name__ == "__main__":
    sys.exit(main())
