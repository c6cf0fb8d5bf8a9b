"""Some faults once in the everyday run, all of them at random in the slow one; scripts/torture.py tries each often."""

import random
import time

import pytest

from tests.stories.faults.faults import FAULTS, calls_of_a_save
from tests.stories.faults.ground import Field

SECONDS = 8  # a fault
NAMES = [f"{fault.number} {fault.name}" for fault in FAULTS]
EVERYDAY = {"1", "3", "8", "13", "17", "21", "22", "30"}


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    return Field(tmp_path_factory.mktemp("field"))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.number in EVERYDAY], ids=lambda fault: fault.name)
def test_a_run_survives(field, fault):
    fault.once(field, random.Random(fault.number), 0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_a_run_survives_whatever_is_drawn(field, fault):
    end_s = time.monotonic() + SECONDS
    while time.monotonic() < end_s:
        seed, turn = random.randrange(1 << 32), random.randrange(fault.times)
        print(f"seed {seed}, turn {turn}")  # shown where it fails
        fault.once(field, random.Random(seed), turn)
        field.clear()


def test_a_save_is_on_the_disk_before_it_is_renamed_and_the_rename_before_it_is_pointed_to(field):
    """SIGKILL is not power loss: what survives that is a matter of order."""
    calls = [(name, line) for name, _, line in calls_of_a_save(field.ground(random.Random(1)))]
    new = ".step-00000006.new"

    def place(name, *parts):
        return next(k for k, (call, line) in enumerate(calls) if call == name and all(part in line for part in parts))

    renamed = place("rename", f'{new}"', 'step-00000006"')
    for file in ("model.safetensors", "training.safetensors", "state.json", "manifest.json"):
        assert place("openat", f"{new}/{file}") < place("fsync", f"{new}/{file}") < renamed
    directory_synced = next(
        k for k in range(renamed, len(calls)) if calls[k][0] == "fsync" and calls[k][1].count("/checkpoints>")
    )
    assert place("fsync", f"{new}>") < renamed < directory_synced
    assert directory_synced < place("rename", ".last.json", "last.json")
