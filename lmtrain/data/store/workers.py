"""Work on the blocks of a corpus: in processes of their own where there is much to do, else in this one.

What comes back is the same either way, and in the order of the blocks. A worker is a plain process with a pipe in and
a pipe out, not one of `multiprocessing`: that would pickle, and import a user's script once more.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any, Protocol

from lmtrain.data.store.encoding import BlockResult
from lmtrain.data.store.messages import receive, send
from lmtrain.data.store.worker import task_of
from lmtrain.data.text.reading import RawBlock
from lmtrain.errors import ArtefactError, DataError, OutOfMemoryError, StorageError
from lmtrain.system.processes import core_count

FEW_BYTES = 16 << 20  # that are sooner done here than a worker has started
MOST_WORKERS = 8  # a hundred megabytes each
AHEAD = 3  # blocks a worker that are read before they are wanted

_NO_MEMORY = "out of memory while text was read; fewer processor cores (taskset -c 0) or a smaller vocabulary take less"
_KINDS = {"DataError": DataError, "ArtefactError": ArtefactError}


class Crew(Protocol):
    """Those who work on blocks."""

    def work(self, raws: Iterable[RawBlock]) -> Iterator[tuple[RawBlock, BlockResult]]:
        """What is made of each block, in order.

        Raises:
            DataError, ArtefactError: the first fault, of reading or of a block.
            OutOfMemoryError, StorageError: a worker is no more.
        """

    def rest(self) -> Iterator[BlockResult]:
        """What each has left at the end."""


class Alone:
    """This process."""

    def __init__(self, header: dict[str, Any], parts: list[bytes]) -> None:
        self._task = task_of(header, parts)

    def work(self, raws: Iterable[RawBlock]) -> Iterator[tuple[RawBlock, BlockResult]]:
        return ((raw, self._task.answer(raw)) for raw in raws)

    def rest(self) -> Iterator[BlockResult]:
        yield self._task.rest()


class _Worker:
    """A process, and what it says of its end."""

    def __init__(self, header: dict[str, Any], parts: list[bytes]) -> None:
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # until `end`
        # this lmtrain, wherever it was found, and not what lies in the working directory under the same name
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        alone |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lmtrain.data.store.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | alone,
        )
        with suppress(BrokenPipeError):  # why it ended is told by the first question
            send(self._stream(self.process.stdin), header, parts)

    @staticmethod
    def _stream(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream

    def ask(self, raw: RawBlock | None) -> BlockResult:
        """What is made of a block; None: what is left."""
        header = {} if raw is None else {key: value for key, value in raw._asdict().items() if key != "data"}
        answer = None
        with suppress(BrokenPipeError):
            send(self._stream(self.process.stdin), header, [] if raw is None else [raw.data])
            answer = receive(self._stream(self.process.stdout))
        if answer is None:
            raise self._gone()
        if (fault := answer.figures.get("fault")) is not None:
            raise _KINDS[fault](*answer.figures["lines"]) if fault in _KINDS else OutOfMemoryError(_NO_MEMORY)
        return answer

    def _gone(self) -> Exception:
        """Why there is no answer any more."""
        code = self.process.wait()
        self.said.seek(0)
        said = self.said.read().decode(errors="replace")
        lacking = ("memory", "Resource temporarily unavailable", "failed to map segment")
        if code == -signal.SIGKILL or any(sign in said for sign in lacking):
            return OutOfMemoryError(_NO_MEMORY)
        if code < 0:
            name = signal.Signals(-code).name
            return StorageError(f"a process that reads text was ended by {name}; start again, and it goes on")
        return RuntimeError(f"a worker ended with {code}:\n{said}")  # a bug of ours

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with suppress(OSError):
                self._stream(stream).close()


class Workers:
    """Several processes, a thread for each that waits for it."""

    def __init__(self, header: dict[str, Any], parts: list[bytes], count: int) -> None:
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "lmtrain-workers")
        try:
            for _ in range(count):
                self._all.append(_Worker(header, parts))
                self._idle.put(self._all[-1])
        except BaseException as error:
            self.end()
            if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise OutOfMemoryError(_NO_MEMORY) from None
            raise

    def _ask(self, raw: RawBlock) -> BlockResult:
        worker = self._idle.get()
        try:
            return worker.ask(raw)
        finally:
            self._idle.put(worker)

    def work(self, raws: Iterable[RawBlock]) -> Iterator[tuple[RawBlock, BlockResult]]:
        under_way: deque[tuple[RawBlock, Future[BlockResult]]] = deque()
        fault: DataError | None = None
        blocks = iter(raws)
        while under_way or fault is None:
            try:
                while fault is None and len(under_way) < AHEAD * len(self._all):
                    if (raw := next(blocks, None)) is None:
                        break
                    under_way.append((raw, self._threads.submit(self._ask, raw)))
            except DataError as error:  # what stands before it comes first
                fault = error
            if not under_way:
                break
            raw, answer = under_way.popleft()
            yield raw, answer.result()
        if fault is not None:
            raise fault

    def rest(self) -> Iterator[BlockResult]:
        return self._threads.map(lambda worker: worker.ask(None), self._all)

    def end(self) -> None:
        """End all processes and threads."""
        for worker in self._all:
            worker.end()
        self._threads.shutdown(cancel_futures=True)


@contextmanager
def crew(header: dict[str, Any], parts: list[bytes], size: int) -> Iterator[Crew]:
    """Those who do a task (`worker.task_of`) on so many bytes."""
    count = min(MOST_WORKERS, core_count())
    if size < FEW_BYTES or count == 1:
        yield Alone(header, parts)
        return
    workers = Workers(header, parts, count)
    try:
        yield workers
    finally:
        workers.end()
