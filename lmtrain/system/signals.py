"""Notes the signals that end a training run, so that the run can save its state first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within this context, SIGINT, SIGTERM and SIGHUP do not end the process; the yielded list gets their numbers.

    The training loop looks at the list after each step. A second signal changes nothing.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handlers = {}
    with suppress(ValueError):  # not the main thread: the host program handles signals
        handlers = {
            number: signal.signal(number, note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores SIGHUP, and that stays so
        }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
