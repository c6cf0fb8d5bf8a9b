"""Worker processes: each does one kind of work on the items that it is sent, and the results come back in order.

If there is little work, or only one processor core, the same interface does the work in this process.

A worker is a plain Python process. It reads messages from its standard input and writes answers to its standard output,
since every system has these pipes. `ProcessPoolExecutor` is not used, for two reasons.
An executor waits forever for a worker that is killed while it sends a result (seen in Python 3.11.2 and 3.13.0), since
it keeps the worker's end of the pipe open. And `multiprocessing` runs the user's script again in each process that it
starts, so a script would have to guard its call of `lmtrain.train` with `if __name__ == "__main__"`.

Messages are pickled. That is safe here: both ends are processes of this lmtrain, and a pipe has no name by which
another program could open it.
"""

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any, Generic, Protocol, TypeVar

from lmtrain.errors import LmtrainError, OutOfMemoryError, StorageError
from lmtrain.system.processes import core_count

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

FEW_BYTES = 16 << 20  # this process is done with fewer bytes before a worker has even started
MOST_WORKERS = 8  # each takes a hundred megabytes
ITEMS_AHEAD = 3  # items per worker that are read before their results are wanted
OUT_OF_MEMORY = (
    "out of memory while text was read; fewer processor cores (taskset -c 0) or a smaller vocabulary take less"
)
KILLED = -9  # the exit code after SIGKILL, a name that Windows lacks
ENDED = (EOFError, OSError, pickle.UnpicklingError)  # the other end has ended, perhaps in the middle of a message
BEGIN = b"\nanswers of lmtrain:\n"  # what is printed while Python starts (a sitecustomize.py may) stands before it
MEMORY_SIGNS = ("memory", "MemoryError", "Resource temporarily unavailable", "failed to map segment")


class WorkerTask(Protocol[Item_contra, Result_co]):
    """The work of one worker, item by item. `finish` returns what the task has collected but not yet returned.

    An LmtrainError that a task raises is raised again in the parent.
    """

    def work(self, item: Item_contra) -> Result_co: ...

    def finish(self) -> Result_co: ...


class SingleWorker(Generic[Item, Result]):
    """Does the work in this process."""

    def __init__(self, task: WorkerTask[Item, Result]) -> None:
        self._task = task

    def work(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        return ((item, self._task.work(item)) for item in items)

    def finish(self) -> Iterator[Result]:
        yield self._task.finish()


class WorkerPool(Generic[Item, Result]):
    """Does the work in several processes, for each of which a thread waits.

    Raises:
        OutOfMemoryError: the system can't start another process.
    """

    def __init__(self, make_task: Callable[[], WorkerTask[Item, Result]], count: int) -> None:
        self.workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "lmtrain-workers")
        try:
            for _ in range(count):
                self.workers.append(_Worker())
            for worker in self.workers:  # all of them are starting by now
                worker.send(make_task)
                self._idle.put(worker)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise OutOfMemoryError(OUT_OF_MEMORY) from None
            raise

    def work(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item with its result, in the order of the items.

        Raises:
            LmtrainError: the first fault in that order, of the iterable or of a task, after all that comes before it.
            OutOfMemoryError, StorageError: a worker was killed.
        """
        pending: deque[tuple[Item, Future[Result]]] = deque()
        remaining = iter(items)
        end: Exception | None = None  # why no more items are read: they are exhausted, or have a fault
        while pending or end is None:
            try:
                while end is None and len(pending) < ITEMS_AHEAD * len(self.workers):
                    item = next(remaining)
                    pending.append((item, self._threads.submit(self._ask_any, item)))
            except (StopIteration, LmtrainError) as error:
                end = error
            if pending:
                item, result = pending.popleft()
                yield item, result.result()
        if isinstance(end, LmtrainError):
            raise end

    def _ask_any(self, item: Item) -> Result:
        worker = self._idle.get()
        try:
            result: Result = worker.ask("work", item)
            return result
        finally:
            self._idle.put(worker)

    def finish(self) -> Iterator[Result]:
        """Yield the result of each task's `finish`, after the last item; raises as `work`."""
        return self._threads.map(lambda worker: worker.ask("finish"), self.workers)

    def close(self) -> None:
        """End all processes and threads, even in the middle of their work."""
        for worker in self.workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()


@contextmanager
def open_workers(
    make_task: Callable[[], WorkerTask[Item, Result]], size_bytes: int
) -> Iterator[SingleWorker[Item, Result] | WorkerPool[Item, Result]]:
    """Yield workers for items of `size_bytes` together. They end with the context.

    `make_task` is pickled; it makes the task of a worker, in the worker.
    """
    count = min(MOST_WORKERS, core_count())
    if size_bytes < FEW_BYTES or count == 1:
        yield SingleWorker(make_task())
        return
    with closing(WorkerPool(make_task, count)) as pool:
        yield pool


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        # -P and PYTHONPATH: the worker imports this lmtrain, and no file of the working directory that has its name
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        self._has_begun = False

    def send(self, message: Any) -> None:
        with suppress(OSError):  # the worker has ended; `ask` says why
            pickle.dump(message, self._requests)
            self._requests.flush()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker's task; raises its LmtrainError, or why the worker has ended."""
        self.send((method, arguments))
        if not self._has_begun:
            while self._answers.readline() not in (BEGIN[1:], b""):
                pass
            self._has_begun = True
        try:
            error_type, answer = pickle.load(self._answers)  # noqa: S301  # from a process of ours
        except ENDED:
            raise self._reason_of_end() from None
        if error_type is not None:
            raise error_type(*answer)
        return answer

    def _reason_of_end(self) -> Exception:
        code = self.process.wait()
        self._output.seek(0)
        output = self._output.read().decode(errors="replace")
        if code == KILLED or any(sign in output for sign in MEMORY_SIGNS):
            return OutOfMemoryError(OUT_OF_MEMORY)
        if code < 0:
            name = signal.Signals(-code).name
            return StorageError(f"a process that reads text was ended by {name}; start again to continue from there")
        return RuntimeError(f"a worker process ended with exit code {code}:\n{output}")  # a bug of ours

    def close(self) -> None:
        self.process.wait()
        for stream in (self._requests, self._answers, self._output):
            with suppress(OSError):  # a message that could not be written
                stream.close()


def _serve() -> None:
    """Work in a worker process until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent, which ends its workers
    gc.disable()  # tasks make no reference cycles, and each collection would visit millions of words
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints belongs to the messages of faults, not among the answers
    with suppress(OSError):  # the parent has ended
        answers.write(BEGIN)
        answers.flush()
    if (make_task := _receive()) is None:
        return
    task = make_task()
    while (message := _receive()) is not None:
        method, arguments = message
        answer: tuple[type[LmtrainError] | None, Any]  # a fault's type and its lines, or None and a result
        try:
            answer = None, getattr(task, method)(*arguments)
        except LmtrainError as error:
            answer = type(error), error.faults
        except MemoryError:
            answer = OutOfMemoryError, (OUT_OF_MEMORY,)
        with suppress(OSError):  # the parent has ended
            pickle.dump(answer, answers)
            answers.flush()


def _receive() -> Any:
    """Return the parent's next message; None if it has closed the pipe or ended."""
    with suppress(*ENDED):
        return pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that started this one
    return None
