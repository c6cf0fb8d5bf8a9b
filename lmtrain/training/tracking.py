"""What a run reports: `metrics.jsonl` in full precision, the same tags in TensorBoard, and progress for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents*"

Lengths = dict[str, int]  # bytes of each metric file


class Tracker:
    """The metric files of a run. Resumed, they are first cut back to where the checkpoint left them.

    Args:
        lengths: of the files at the checkpoint; files it does not name are of steps that will come again.
    """

    def __init__(self, run: Path, lengths: Lengths, notify: Callable[[str], None]) -> None:
        self.run, self.notify = run, notify
        for path in [run / METRICS, *run.glob(EVENTS)]:
            if path.name not in lengths:
                path.unlink(missing_ok=True)
            elif path.exists() and path.stat().st_size > lengths[path.name]:
                os.truncate(path, lengths[path.name])
        self.metrics = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115  # until `close`
        self.board: SummaryWriter | None = None
        self._on_board(lambda: setattr(self, "board", SummaryWriter(str(run))))

    def log(self, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """One row: numbers by tag, and under `samples` what the model wrote."""
        row = {"step": step, "epoch": epoch, **values}
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.metrics.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self.metrics.flush()
        self._on_board(lambda: self._add(step, values))

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        if self.board is None:
            return
        for tag, value in values.items():
            if tag == "samples":
                text = "\n\n".join(f"    {sample['text'] or ' '}".replace("\n", "\n    ") for sample in value)
                self.board.add_text("samples", text, step)
            elif value is not None:
                self.board.add_scalar(tag, value, step)

    def histograms(self, step: int, model: nn.Module) -> None:
        """The distribution of every weight."""
        for name, parameter in model.named_parameters():
            self._on_board(partial(self._add_histogram, name, parameter.detach(), step))

    def _add_histogram(self, name: str, values: Tensor, step: int) -> None:
        if self.board is not None:
            self.board.add_histogram(name, values, step)

    def hyperparameters(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """The run's settings beside what it reached, for TensorBoard's HPARAMS page."""
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}

        def add() -> None:
            if self.board is not None:
                for summary in hparams(plain, dict(figures)):
                    self.board.file_writer.add_summary(summary)

        self._on_board(add)

    def _on_board(self, action: Callable[[], object]) -> None:
        """TensorBoard is a convenience: where it can't be written, training goes on without, and says so once."""
        try:
            action()
        except OSError as error:
            self.board = None
            self.notify(f"warning: TensorBoard's file can not be written ({error.strerror}); going on without it")

    def lengths(self) -> Lengths:
        """Bytes of each metric file, all of them on disk."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        self._on_board(lambda: self.board and self.board.flush())
        return {path.name: path.stat().st_size for path in [self.run / METRICS, *self.run.glob(EVENTS)]}

    def close(self) -> None:
        self.metrics.close()
        self._on_board(lambda: self.board and self.board.close())


class Progress(Protocol):
    """Where a run stands, for whoever watches."""

    def note(self, line: str) -> None:
        """A line to be kept in sight."""

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """A step was done; `progress` is the share of the training that is behind, `figures` the latest."""

    def close(self) -> None:
        """The training is over."""


class Quiet:
    """No progress."""

    def note(self, line: str) -> None: ...

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def say(line: str) -> None:
    """A line on standard error; training does not end because nobody listens any more."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Bar:
    """A tqdm bar, for a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] = tqdm(unit="step", file=sys.stderr, dynamic_ncols=True, leave=True)

    def note(self, line: str) -> None:
        with self.bar.external_write_mode(file=sys.stderr):
            say(line)

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        if self.bar.n == 0 and step > 1:  # resumed
            self.bar.initial = self.bar.n = step - 1
        self.bar.total = max(step, round(step / progress)) if progress > 0 else None
        if figures:
            self.bar.set_postfix_str(_figures(figures), refresh=False)
        with suppress(OSError, ValueError):  # the terminal is gone
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        with suppress(OSError, ValueError):
            self.bar.close()


class Lines:
    """Plain lines now and then, for a file or a pipe."""

    EVERY_S = 10.0

    def __init__(self) -> None:
        self.start_s = self.last_s = time.monotonic()
        self.first_progress: float | None = None

    def note(self, line: str) -> None:
        say(line)

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if self.first_progress is None:
            self.first_progress = progress
        if now_s - self.last_s < self.EVERY_S or not figures:
            return
        self.last_s = now_s
        done = progress - self.first_progress
        left_s = (now_s - self.start_s) * (1 - progress) / done if done > 0 else math.nan
        left = f"{int(left_s) // 60}:{int(left_s) % 60:02d}" if math.isfinite(left_s) else "?"
        self.note(f"step {step} ({progress:.0%})  {_figures(figures)}  {left} left")

    def close(self) -> None: ...


def _figures(figures: Mapping[str, float]) -> str:
    return (
        f"loss {figures['train/loss']:.3f}  perplexity {figures['train/perplexity']:.2f}  "
        f"{figures['train/tokens_per_second']:,.0f} tokens/s"
    )
