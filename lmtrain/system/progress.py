"""Shows how far training is: not at all, as a bar on a terminal, or as plain lines now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from tqdm import tqdm

from lmtrain.errors import escape
from lmtrain.system.console import say


class Progress:
    """Base class: the methods that training calls to tell the user how far it is. Here they show nothing."""

    def note(self, line: str) -> None:
        """Show a line that stays visible."""

    def reading(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Show how many bytes of some files were read, hashed or learnt from; `what` says which of these."""

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        """Show that a step was done; `progress` is the fraction of the training done, `figures` are by tag."""

    def close(self) -> None:
        """End the display, when training is over."""


class NullProgress(Progress):
    """Shows nothing."""


class Bar(Progress):
    """Shows a tqdm bar on a terminal: one of bytes while text is read, then one of steps."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.what = ""

    def _begin(self, what: str, **settings: Any) -> tqdm[Any]:
        if self.bar is None or self.what != what:
            self.close()
            self.what, self.bar = what, tqdm(file=sys.stderr, dynamic_ncols=True, **settings)
        return self.bar

    def note(self, line: str) -> None:
        with nullcontext() if self.bar is None else self.bar.external_write_mode(file=sys.stderr):
            say(line)

    def reading(self, what: str, done_bytes: int, total_bytes: int) -> None:
        bar = self._begin(
            what, desc=escape(what, kept=""), unit="B", unit_scale=True, leave=False, delay=0.5, initial=done_bytes
        )
        bar.total = total_bytes
        with suppress(OSError, ValueError):  # the terminal is gone
            bar.update(done_bytes - bar.n)
            if done_bytes >= total_bytes:
                self.close()

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        bar = self._begin("steps", unit="step", leave=True)
        if bar.n == 0 and step > 1:  # a resumed run begins here
            bar.initial = bar.n = step - 1
        bar.total = max(step, round(step / progress)) if progress > 0 else None
        if figures:
            bar.set_postfix_str(_figures(figures), refresh=False)
        with suppress(OSError, ValueError):  # the terminal is gone
            bar.update(step - bar.n)

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.close()
        self.bar = None


class Lines(Progress):
    """Writes plain lines now and then, for a file or a pipe."""

    EVERY_S = 10.0

    def __init__(self) -> None:
        self.what = ""
        self.start_s = self.last_s = time.monotonic()
        self.initial = 0.0  # how much was done when the clock started

    def _begin(self, what: str, done: float) -> None:
        """Start the clock anew when another kind of work begins."""
        if what != self.what:
            self.what, self.initial = what, done
            self.start_s = self.last_s = time.monotonic()

    def _is_due(self) -> bool:
        if time.monotonic() - self.last_s < self.EVERY_S:
            return False
        self.last_s = time.monotonic()
        return True

    def _time_left(self, done: float, total: float) -> str:
        gained = done - self.initial
        left_s = (time.monotonic() - self.start_s) * (total - done) / gained if gained > 0 else math.nan
        return f"{int(left_s) // 60}:{int(left_s) % 60:02d} left" if math.isfinite(left_s) else "? left"

    def note(self, line: str) -> None:
        say(line)

    def reading(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._begin(what, done_bytes)
        if self._is_due():
            rate = (done_bytes - self.initial) / 1e6 / (self.last_s - self.start_s)
            fraction, left = done_bytes / max(1, total_bytes), self._time_left(done_bytes, total_bytes)
            self.note(f"{what}: {fraction:.0%}, {rate:.1f} MB/s, {left}")

    def update(self, step: int, progress: float, figures: Mapping[str, float]) -> None:
        self._begin("steps", progress)
        if figures and self._is_due():
            self.note(f"step {step} ({progress:.0%})  {_figures(figures)}  {self._time_left(progress, 1)}")


def _figures(figures: Mapping[str, float]) -> str:
    return (
        f"loss {figures['train/loss']:.3f}  perplexity {figures['train/perplexity']:.2f}  "
        f"{figures['train/tokens_per_second']:,.0f} tokens/s"
    )
