"""Worker processes: what they do comes back in order, and what ends them is said in a line."""

import os
import pickle
import signal
import stat
import sys
import time
from contextlib import closing

import pytest

from lmtrain.errors import ArtefactError, DataError, OutOfMemoryError, StorageError
from lmtrain.system import workers
from lmtrain.system.workers import SingleWorker, WorkerPool, open_workers

SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows lacks it, and ends a process at once by the other
windows = pytest.mark.skipif(sys.platform == "win32", reason="signals do not end a process on Windows")


def is_pipe(descriptor):
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


class Square:
    """A task that remembers what it has seen. It is imported by the workers, so this file imports no torch."""

    def __init__(self):
        self.seen = []

    def work(self, item):
        self.seen.append(item)
        if item == "modules":
            return sorted(sys.modules), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.environ["OMP_NUM_THREADS"]
        if item in (7, 11):
            time.sleep(0.2 if item == 7 else 0)  # the later fault is found first
            raise (DataError if item == 7 else ArtefactError)(f"{item}: a fault", "and another")
        if item == "memory":
            raise MemoryError
        if item == "bug":
            raise ZeroDivisionError("a bug")
        if item == "half a message":
            pipes = [each for each in range(1, 64) if is_pipe(each)]  # standard output is not among them any more
            os.write(pipes[-1], pickle.dumps(bytes(100))[:50])
            os.kill(os.getpid(), SIGKILL)
        if item == "a print":
            print("not an answer")
            os.write(1, b"nor this")
        if isinstance(item, signal.Signals):
            os.kill(os.getpid(), item)
        return None if isinstance(item, str) else item * item

    def finish(self):
        return self.seen


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(workers, "core_count", lambda: 3)
    with open_workers(Square, workers.FEW_BYTES) as pool:
        assert isinstance(pool, WorkerPool)
        yield pool


def test_few_bytes_or_one_core_need_no_process(monkeypatch):
    for cores, size_bytes in ((3, workers.FEW_BYTES - 1), (1, workers.FEW_BYTES)):
        monkeypatch.setattr(workers, "core_count", lambda cores=cores: cores)
        with open_workers(Square, size_bytes) as alone:
            assert isinstance(alone, SingleWorker)
            assert list(alone.work([3, 1])) == [(3, 9), (1, 1)]
            assert list(alone.finish()) == [[3, 1]]


def test_results_come_in_order_and_each_worker_gives_what_it_has_left(pool):
    items = [number for number in range(60) if number not in (7, 11)]
    assert list(pool.work(iter(items))) == [(number, number**2) for number in items]
    assert sorted(number for seen in pool.finish() for number in seen) == items


def test_what_a_library_prints_is_not_an_answer(pool):
    assert list(pool.work([2, "a print", 3])) == [(2, 4), ("a print", None), (3, 9)]


def test_what_is_printed_while_python_starts_is_not_an_answer(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('of this machine', end='', flush=True)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with closing(WorkerPool(Square, 2)) as pool:
        assert list(pool.work([2, 3])) == [(2, 4), (3, 9)]


def test_items_are_read_only_a_little_ahead(pool):
    read = []
    results = pool.work(read.append(number) or 2 for number in range(1000))
    next(results)
    assert len(read) == 3 * workers.ITEMS_AHEAD


def test_the_first_fault_in_order_is_raised_with_all_its_lines(pool):
    with pytest.raises(DataError) as error:
        list(pool.work(range(20)))
    assert error.value.faults == ("7: a fault", "and another")
    with pytest.raises(ArtefactError):
        list(pool.work([11]))


def test_what_comes_before_a_fault_of_the_items_is_done_first(pool):
    def items():
        yield from (1, 2, 3)
        raise DataError("broken")

    done = []
    with pytest.raises(DataError, match="broken"):
        done.extend(item for item, _ in pool.work(items()))
    assert done == [1, 2, 3]


@windows
@pytest.mark.parametrize(
    ("item", "fault", "what"),
    [
        (SIGKILL, OutOfMemoryError, "out of memory while text was read; "),
        ("memory", OutOfMemoryError, "out of memory while text was read; "),
        ("half a message", OutOfMemoryError, "out of memory while text was read; "),
        (signal.SIGTERM, StorageError, "ended by SIGTERM; start again"),
        ("bug", RuntimeError, "(?s)Traceback.*in work.*ZeroDivisionError: a bug"),
    ],
    ids=str,
)
def test_a_worker_that_ends_is_reported_in_one_line(pool, item, fault, what):
    with pytest.raises(fault, match=what) as error:
        list(pool.work([1, 2, item, 4]))
    assert fault is RuntimeError or len(error.value.faults) == 1


def test_a_worker_has_one_thread_and_no_torch_and_leaves_ctrl_c_to_its_parent(pool):
    [(_, (modules, ignored, threads))] = pool.work(["modules"])
    assert (ignored, threads) == (True, "1")
    assert "torch" not in modules


@windows
def test_the_end_of_the_pool_ends_workers_in_the_middle_of_their_work(monkeypatch):
    monkeypatch.setattr(workers, "core_count", lambda: 2)
    with open_workers(Square, workers.FEW_BYTES) as pool:
        processes = [worker.process for worker in pool.workers]
        pool._threads.submit(pool._ask_any, 7)
    assert [process.returncode for process in processes] == [-SIGKILL] * 2


def test_a_pool_that_the_system_refuses_is_a_lack_of_memory(monkeypatch):
    def refuse(*arguments, **more):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers, "core_count", lambda: 2)
    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with pytest.raises(OutOfMemoryError, match="out of memory"), open_workers(Square, workers.FEW_BYTES):
        pass
