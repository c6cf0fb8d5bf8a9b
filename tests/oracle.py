"""What a training run came to, for telling whether two came to the same."""

import hashlib
import json
from pathlib import Path

from lmtrain.runs import checkpoint

WALL_CLOCK = ("_per_second", "_s", "wait_fraction")  # the metrics that no two runs share


def digest(run: Path) -> str:
    """The tensors of the last checkpoint and every metric row, wall-clock values aside."""
    saved = checkpoint.load(run / "checkpoints", json.loads((run / "last.json").read_text())["step"])
    whole = hashlib.sha256(str(saved.step).encode())
    for tensors in (saved.model, saved.training):
        for name, tensor in sorted(tensors.items()):
            whole.update(name.encode() + tensor.numpy().tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        whole.update(json.dumps({key: v for key, v in row.items() if not key.endswith(WALL_CLOCK)}).encode())
    return whole.hexdigest()
