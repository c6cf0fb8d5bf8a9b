"""The processes that train one model together, and how they exchange values and faults.

`torchrun` starts the processes, on one machine or several (https://docs.pytorch.org/docs/stable/elastic/run.html), and
sets the rank of each, 0 .. world size - 1, in its environment. Rank 0 writes the run; the other ranks only compute. A
fault in one process ends all of them, and one process reports it. No exchange lasts longer than a timeout.

On CPUs, where gloo connects the processes, one process reports a lost one in a line, with exit code 5. NCCL, which
connects CUDA devices, only queues work. There a thread of PyTorch's notices a lost process, writes a report of its own
and aborts the other processes (`TORCH_NCCL_ASYNC_ERROR_HANDLING`,
https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html), or torchrun ends them first: exit codes are
then those of signals. The weights have not moved in the lost step, and the checkpoints are whole either way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lmtrain.errors import ConfigError, LmtrainError, PeerError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_VARIABLE = "LMTRAIN_TIMEOUT_S"
TIMEOUT_S = 600.0  # the longest that one process waits for another, if the environment sets no other timeout
POLL_S, GRACE_S = 0.05, 1.0
REPORTS = "reports"  # the store's counter of processes that reported a fault
# words in the RuntimeErrors that PyTorch raises when a connection breaks; gloo has no class of error for that
CONNECTION_FAULTS = (
    "gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout",
)  # fmt: skip


class SingleProcess:
    """A process that trains alone. `ProcessGroup` has the same methods for several processes."""

    rank = 0
    world_size = 1
    under_torchrun = False  # whether torchrun started this process, perhaps as the only one
    restarted = False  # whether torchrun started these processes again after a fault
    launch: str | None = None  # a name for all processes that one torchrun starts

    def run_in_all(self, action: Callable[[], T], *, rank_0_first: bool = False) -> T:
        """Run an action in every process, and return its result if it failed in none.

        Args:
            rank_0_first: the other processes wait until rank 0 is done, however long that takes.

        Raises:
            LmtrainError: what the action raised, in the lowest rank in which it failed.
            PeerError: in all other ranks.
        """
        return action()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each process, by rank; every process gives the same number of values."""
        return [list(values)]

    def broadcast(self, value: Any) -> Any:
        """Return the value that rank 0 gives, which can be anything that JSON can hold."""
        return value

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors (of any shape) that rank 0 gives, one by one; in the other processes they lie on the CPU.

        Every process has to take all of them, since each is exchanged when it is taken."""
        yield from tensors.items()

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of each process, by rank; all have the shape of this one and lie where it lies."""
        return [tensor]

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Within this context, a broken connection raises StorageError: another process ended, or did not answer."""
        yield

    def threads(self) -> int | None:
        """Return how many CPU threads this process should use; None for PyTorch's own choice."""
        return None


class ProcessGroup(SingleProcess):
    """This process as one of those that torchrun started.

    Raises:
        ConfigError: the environment variables are not as torchrun sets them.
        StorageError: the other processes can't be reached.
    """

    under_torchrun = True

    def __init__(self) -> None:
        import torch
        import torch.distributed as distributed
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        environment = os.environ
        try:
            self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            port, timeout_s = int(environment["MASTER_PORT"]), float(environment.get(TIMEOUT_VARIABLE, TIMEOUT_S))
            self.local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
            if not (0 <= self.rank < self.world_size and 0 < port < 1 << 16 and 0 < timeout_s < 1e7):
                raise ValueError
        except ValueError:
            names = (*TORCHRUN_VARIABLES, TIMEOUT_VARIABLE)
            variables = ", ".join(f"{name}={environment.get(name, '')[:40]}" for name in names)
            raise ConfigError(f"{variables}: not as torchrun sets them; unset them, or start with torchrun") from None
        self.name = f"rank {self.rank} on {socket.gethostname()}"  # the name of this process in messages
        self.restarted = attempt > 0
        run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
        self.launch = run_id if run_id != "none" else f"agent {os.getppid()}"
        self._actions = 0  # how many actions `run_in_all` has run
        self._known_fault: LmtrainError | None = None  # a fault that all other processes know of
        host = environment["MASTER_ADDR"]
        agent_keeps_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        timeout = timedelta(seconds=timeout_s)
        with self.communicating():
            try:
                self._keeps_store = not agent_keeps_store and self.rank == 0
                base = TCPStore(host, port, is_master=self._keeps_store, timeout=timeout, wait_for_workers=False)
            except RuntimeError as error:
                why = "the port is in use" if "EADDRINUSE" in str(error) else "can't be reached"
                raise StorageError(f"{host[:100]}:{port}: {why}; see torchrun --master-port") from None
            # the store may outlive processes that torchrun restarts, so each attempt has its own prefix in it
            self.store = PrefixStore(f"lmtrain/{attempt}", base)
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )

    def run_in_all(self, action: Callable[[], T], *, rank_0_first: bool = False) -> T:
        self._actions += 1
        done = [f"done-{self._actions}-{rank}" for rank in range(self.world_size)]
        if rank_0_first and self.rank:
            self._wait(done[:1])
        fault: LmtrainError | None = None
        try:
            result = action()
        except LmtrainError as error:
            fault = error
        with self.communicating():
            self.store.set(done[self.rank], "")
        self._wait(done)
        exit_codes = self._gather_json(None if fault is None else fault.exit_code)
        failed = [rank for rank, exit_code in enumerate(exit_codes) if exit_code is not None]
        if not failed:
            return result
        if fault is None or self.rank != failed[0]:
            raise PeerError(exit_codes[failed[0]])
        self._known_fault = fault
        if len(failed) < self.world_size:
            fault.faults = tuple(f"{self.name}: {line}" for line in fault.faults)
        raise fault

    def _wait(self, keys: list[str]) -> None:
        """Wait until these keys are set, without a timeout, since building a token store may take long.

        If a process ends meanwhile, torchrun notices and ends the others.
        """
        with self.communicating():
            while not self.store.check(keys):  # polled, since a blocking wait would not let a signal through
                if self.store.check([REPORTS]):
                    raise PeerError(LostError.exit_code)
                time.sleep(POLL_S)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        import torch

        return [part.tolist() for part in self.gather_tensor(torch.tensor(values, dtype=torch.float64))]

    def _gather_json(self, value: Any) -> list[Any]:
        """Return the value of each process, by rank; a value can be anything that JSON can hold."""
        import torch

        data = json.dumps(value).encode()
        longest = int(max(length for (length,) in self.gather([len(data)])))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.gather_tensor(padded)]

    def broadcast(self, value: Any) -> Any:
        return self._gather_json(value if self.rank == 0 else None)[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        import torch
        import torch.distributed as distributed

        own = tensors if self.rank == 0 else {}
        specs = {name: [str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in own.items()}
        for name, (dtype, shape) in self.broadcast(specs).items():
            sent = own[name].detach().cpu().contiguous() if own else torch.empty(shape, dtype=getattr(torch, dtype))
            with self.communicating():
                distributed.broadcast(sent, 0)
            yield name, sent

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        import torch
        import torch.distributed as distributed

        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.communicating():
            distributed.all_gather(parts, tensor.contiguous())
        return parts

    @contextmanager
    def communicating(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in CONNECTION_FAULTS):
                raise
            raise LostError(
                f"{self.name}: lost another process ({str(error).splitlines()[0][-100:]}); the checkpoints are whole: "
                "start all processes again with --resume"
            ) from None

    def threads(self) -> int | None:
        return max(1, core_count() // self.local_world_size)

    def must_report(self, error: BaseException) -> bool:
        """Tell whether this process is the one that reports the fault that ends all processes."""
        if isinstance(error, PeerError) or error is self._known_fault:
            return error is self._known_fault
        with suppress(RuntimeError):  # the store ended with the process that kept it
            if isinstance(error, LostError):  # the process that caused this gets time to report first
                self._wait_briefly(lambda: self.store.check([REPORTS]))
            count = self.store.add(REPORTS, 1)
            if self._keeps_store:  # the store ends with this process, so the others get time to ask it
                self._wait_briefly(lambda: self.store.add(REPORTS, 0) == self.world_size)
            return bool(count == 1)
        return False

    def _wait_briefly(self, is_done: Callable[[], bool]) -> None:
        end_s = time.monotonic() + GRACE_S
        while time.monotonic() < end_s and not is_done():
            time.sleep(POLL_S)


class LostError(StorageError):
    """Another process has ended, or has not answered in time."""


def core_count() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched_by_torchrun() -> bool:
    """Tell whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


@contextmanager
def join_processes() -> Iterator[SingleProcess]:
    """Connect the processes that torchrun started; without torchrun, this process trains alone.

    Raises:
        LmtrainError: a fault, in the one process that reports it.
        PeerError: in all other processes.
    """
    if not launched_by_torchrun():
        yield SingleProcess()
        return
    processes = ProcessGroup()
    try:
        yield processes
    except LmtrainError as error:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it once any process has ended
        if not processes.must_report(error):
            raise PeerError(error.exit_code) from None
        raise
    except Exception as error:
        processes.must_report(error)  # counts this process, which reports by its traceback
        raise
    import torch.distributed as distributed

    distributed.destroy_process_group()


def require_equal(processes: SingleProcess, mine: Mapping[str, Any], message: str, kind: type[LmtrainError]) -> None:
    """Compare the values of this process with those of rank 0, which should be the same in all processes.

    Args:
        message: the message on a key that differs; `{key}`, `{mine}` and `{first}` (rank 0's value) are filled in.

    Raises:
        LmtrainError: a value differs; the error is of this kind, or a PeerError.
    """
    first = processes.broadcast(dict(mine))

    def check() -> None:
        for key in [*first, *mine]:
            if mine.get(key) != first.get(key):
                raise kind(message.format(key=key, mine=mine.get(key), first=first.get(key)))

    processes.run_in_all(check)
