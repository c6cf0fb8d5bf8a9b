"""Notes the signals that end a training run, so that the run can save its state first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within this context, SIGINT, SIGTERM and SIGHUP do not end the process; the yielded list gets their numbers.

    The training loop looks at the list after each step, and between the batches of a validation. A second signal
    changes nothing, so that no save is broken off.
    """
    received: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handlers = {}
    with suppress(ValueError):  # not the main thread: the host program handles signals
        handlers = {
            number: signal.signal(number, note)
            for number in numbers
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores SIGHUP, and that stays so
        }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
