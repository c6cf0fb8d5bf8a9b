"""The metric files of a run: `metrics.jsonl` in full precision, and the same tags in TensorBoard."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils.tensorboard.summary import histogram, hparams, scalar, text

from lmtrain.errors import StorageError
from lmtrain.system.files import reason_of, sync_file

METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents*"
HISTOGRAM_BINS = 64

Lengths = dict[str, int]  # bytes of each metric file


class Tracker:
    """The metric files of a run. In a resume they are first cut back to where they ended at the checkpoint.

    Args:
        lengths: bytes of each file at the checkpoint; files that it does not name hold steps that will be repeated.

    Raises:
        StorageError: here or later, `metrics.jsonl` can't be written.
    """

    def __init__(self, run: Path, lengths: Lengths, notify: Callable[[str], None]) -> None:
        self.run, self.notify = run, notify
        try:
            for path in [run / METRICS, *run.glob(EVENTS)]:
                if path.name not in lengths:
                    path.unlink(missing_ok=True)
                elif path.exists() and path.stat().st_size > lengths[path.name]:
                    os.truncate(path, lengths[path.name])
            self.metrics = open(run / METRICS, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  # until `close`
        except OSError as error:
            raise self._fault(error) from None
        if self.metrics.tell() < lengths.get(METRICS, 0):
            notify(f"warning: {run / METRICS} is shorter than it was at the checkpoint: rows are missing")
        self.board: Board | None = None
        try:
            self.board = Board(run)
        except OSError as error:
            self._lose_board(error)

    def _fault(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.run / METRICS}: {reason_of(error)}; the checkpoints are whole: repair that, and --resume continues"
        )

    def log(self, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Write one row: numbers by tag, and under `samples` what the model wrote."""
        row = {"step": step, "epoch": epoch, **values}
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            self.metrics.write(json.dumps(finite, ensure_ascii=False) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise self._fault(error) from None
        self._on_board(lambda board: board.write(step, _summaries(values)))

    def histograms(self, step: int, model: nn.Module) -> None:
        """Write the distribution of every weight. A weight with values that are not finite has none, and is left out:
        such a run ends at its next save."""
        weights = ((name, weight.detach().cpu().double().numpy()) for name, weight in model.named_parameters())
        summaries = (histogram(name, values, HISTOGRAM_BINS) for name, values in weights if np.isfinite(values).all())
        self._on_board(lambda board: board.write(step, summaries))

    def hyperparameters(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """Write the run's settings and its figures for TensorBoard's HPARAMS page."""
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
        self._on_board(lambda board: board.write(0, hparams(plain, dict(figures))))

    def _on_board(self, write: Callable[[Board], None]) -> None:
        """Write to TensorBoard's file. If it can't be written, training continues without it and says so once."""
        if self.board is None:
            return
        try:
            write(self.board)
        except OSError as error:
            self._lose_board(error)

    def _lose_board(self, error: OSError) -> None:
        self.board = None
        self.notify(f"warning: TensorBoard's file can't be written ({error.strerror}); training continues without it")

    def lengths(self) -> Lengths:
        """Return the bytes of each metric file, once all rows are on the disk itself."""
        try:
            sync_file(self.metrics)
            return {path.name: path.stat().st_size for path in [self.run / METRICS, *self.run.glob(EVENTS)]}
        except OSError as error:
            raise self._fault(error) from None

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was reported before
            self.metrics.close()
        self._on_board(Board.close)


def _summaries(values: Mapping[str, Any]) -> Iterator[Any]:
    """TensorBoard's summaries of a row of metrics."""
    for tag, value in values.items():
        if tag == "samples":
            yield text(tag, "\n\n".join(f"    {each['text'] or ' '}".replace("\n", "\n    ") for each in value))
        elif value is not None:
            yield scalar(tag, value)


class NullTracker(Tracker):
    """Writes nothing; every process but rank 0 has this tracker."""

    def __init__(self) -> None: ...

    def log(self, step: int, epoch: float, values: Mapping[str, Any]) -> None: ...

    def histograms(self, step: int, model: nn.Module) -> None: ...

    def hyperparameters(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None: ...

    def lengths(self) -> Lengths:
        return {}

    def close(self) -> None: ...


class Board:
    """TensorBoard's event file. PyTorch's writer is not used: its thread reports faults late, and out of place.

    Raises:
        OSError: here or later, it can't be written.
    """

    def __init__(self, run: Path) -> None:
        now_ns = time.time_ns()  # two runs of one second need different names
        name = f"{EVENTS.removesuffix('*')}.{now_ns // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self.handle = open(run / f"{name}.{now_ns % 10**9:09d}", "xb")  # noqa: SIM115  # until `close`
        self.records = RecordWriter(self.handle)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, summaries: Iterable[Any]) -> None:
        """Write summaries that `torch.utils.tensorboard.summary` has made."""
        for summary in summaries:
            self._write(Event(wall_time=time.time(), step=step, summary=summary))
        self.handle.flush()

    def _write(self, event: Event) -> None:
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        self.handle.close()
