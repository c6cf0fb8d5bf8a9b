"""The processes that train one model together, and how they come to agree.

`torchrun` starts them, on one machine or several (https://docs.pytorch.org/docs/stable/elastic/run.html), and tells
each its place in the environment: its rank, 0 .. world size - 1. Rank 0 writes the run; all others only compute. A
fault in one of them ends all, and one of them tells of it. No exchange lasts longer than a timeout.
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

GIVEN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = "LMTRAIN_TIMEOUT_S"
TIMEOUT_S = 600.0  # longest that one process waits for another, unless the environment says otherwise
LOOK_AGAIN_S, LINGER_S = 0.05, 1.0
# what is raised where a connection breaks: gloo has no class of error for that
SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout")


class SingleProcess:
    """One process, with nobody to agree with: what `ProcessGroup` does among several, at no cost."""

    rank = 0
    world_size = 1
    together = False  # whether torchrun started this process, be it as the only one
    restarted = False  # whether it started these processes anew after a fault
    launch: str | None = None  # a name for all that one torchrun starts

    def agree(self, action: Callable[[], T], *, rank_0_first: bool = False) -> T:
        """Run an action in every process, to go on only if it failed in none.

        Args:
            rank_0_first: the others wait until it is done there, however long that takes.

        Raises:
            LmtrainError: in the lowest rank in which it failed, what the action raised.
            PeerError: in all others.
        """
        return action()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each process, by rank."""
        return [list(values)]

    def exchange(self, value: Any) -> list[Any]:
        """What each process has to say, as JSON has it, by rank."""
        return [value]

    def share(self, value: Any) -> Any:
        """What rank 0 has to say, as JSON has it."""
        return value

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of rank 0, on CPU in the others."""
        return tensors

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """A tensor on CPU, of one shape in all processes, of each of them."""
        return [tensor]

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """While this lasts, a broken connection is told as such.

        Raises:
            StorageError: another process is gone, or has not answered in time.
        """
        yield

    def threads(self) -> int | None:
        """CPU threads that are this process's share of the machine; None: as many as PyTorch takes."""
        return None


class ProcessGroup(SingleProcess):
    """This process among those that torchrun started.

    Raises:
        ConfigError: the environment is not as torchrun makes it.
        StorageError: the others can't be reached.
    """

    together = True

    def __init__(self) -> None:
        import torch
        import torch.distributed as distributed
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        environment = os.environ
        try:
            self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            port, timeout_s = int(environment["MASTER_PORT"]), float(environment.get(TIMEOUT, TIMEOUT_S))
            self.local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
            if not (0 <= self.rank < self.world_size and 0 < port < 1 << 16 and 0 < timeout_s < 1e7):
                raise ValueError
        except ValueError:
            said = ", ".join(f"{name}={environment.get(name, '')[:40]}" for name in (*GIVEN, TIMEOUT))
            raise ConfigError(f"{said}: not as torchrun sets them; unset them, or start with torchrun") from None
        self.restarted = attempt > 0
        name = environment.get("TORCHELASTIC_RUN_ID", "none")
        self.launch = name if name != "none" else f"agent {os.getppid()}"
        self._agreements = 0
        self._agreed: LmtrainError | None = None  # the fault that all know of
        host = environment["MASTER_ADDR"]
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself keeps the store
        timeout = timedelta(seconds=timeout_s)
        with self.communicating():
            try:
                self._keeps_store = not agent and self.rank == 0
                base = TCPStore(host, port, is_master=self._keeps_store, timeout=timeout, wait_for_workers=False)
            except RuntimeError as error:
                why = "the port is in use" if "EADDRINUSE" in str(error) else "can't be reached"
                raise StorageError(f"{host[:100]}:{port}: {why}; see torchrun --master-port") from None
            # a store may outlive processes that were started anew: each attempt has its own part of it
            self.store = PrefixStore(f"lmtrain/{attempt}", base)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(
                backend,
                store=PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )

    @property
    def name(self) -> str:
        """For a message."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def agree(self, action: Callable[[], T], *, rank_0_first: bool = False) -> T:
        self._agreements += 1
        done = [f"done-{self._agreements}-{rank}" for rank in range(self.world_size)]
        if rank_0_first and self.rank:
            self._wait(done[:1])
        fault: LmtrainError | None = None
        result: list[T] = []
        try:
            result.append(action())
        except LmtrainError as error:
            fault = error
        with self.communicating():
            self.store.set(done[self.rank], "")
        self._wait(done)
        said = self.exchange(None if fault is None else [fault.exit_code, list(fault.faults)])
        failed = [rank for rank, each in enumerate(said) if each is not None]
        if not failed:
            return result[0]
        if fault is None or self.rank != failed[0]:
            raise PeerError(said[failed[0]][0])
        self._agreed = fault
        if len(failed) < self.world_size:
            fault.faults = tuple(f"{self.name}: {line}" for line in fault.faults)
        raise fault

    def _wait(self, keys: list[str]) -> None:
        """However long it takes, for a store of tokens may be built; whoever ends before then is torchrun's to see."""
        with self.communicating():
            while not self.store.check(keys):  # by looking, so that a signal gets through
                if self.store.check(["told"]):
                    raise PeerError(LostError.exit_code)
                time.sleep(LOOK_AGAIN_S)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        import torch

        return [part.tolist() for part in self.gather_tensor(torch.tensor(values, dtype=torch.float64))]

    def exchange(self, value: Any) -> list[Any]:
        import torch

        data = json.dumps(value).encode()
        longest = int(max(length for (length,) in self.gather([len(data)])))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.gather_tensor(padded)]

    def share(self, value: Any) -> Any:
        return self.exchange(value if self.rank == 0 else None)[0]

    def share_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        import torch
        import torch.distributed as distributed

        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if self.rank == 0}
        kinds = self.share(
            {name: [str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in own.items()}
        )
        shared = {}
        for name, (dtype, shape) in kinds.items():
            tensor = own[name] if self.rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
            with self.communicating():
                distributed.broadcast(tensor, 0)
            shared[name] = tensor
        return shared

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
            if not any(sign in str(error).lower() for sign in SIGNS):
                raise
            raise LostError(
                f"{self.name}: lost another process ({str(error).splitlines()[0][-100:]}); what was saved is whole: "
                "start all again with --resume"
            ) from None

    def threads(self) -> int | None:
        return max(1, core_count() // self.local_world_size)

    def tells(self, error: BaseException) -> bool:
        """Whether it is this process that tells of the fault that ends all."""
        if isinstance(error, PeerError) or error is self._agreed:
            return error is self._agreed
        with suppress(RuntimeError):  # the store is gone with whoever kept it
            if isinstance(error, LostError):  # whoever caused it had the time to tell
                self._linger(lambda: self.store.check(["told"]))
            told = self.store.add("told", 1)
            if self._keeps_store:
                self._linger(lambda: self.store.add("told", 0) == self.world_size)
            return bool(told == 1)
        return False

    def _linger(self, until: Callable[[], bool]) -> None:
        end_s = time.monotonic() + LINGER_S
        while time.monotonic() < end_s and not until():
            time.sleep(LOOK_AGAIN_S)


class LostError(StorageError):
    """Another process is gone, or has not answered in time."""


def core_count() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in GIVEN)


@contextmanager
def join_processes() -> Iterator[SingleProcess]:
    """The processes that train together; one alone where torchrun started none.

    Raises:
        LmtrainError: a fault, in the one process that tells of it.
        PeerError: in all others.
    """
    if not launched_by_torchrun():
        yield SingleProcess()
        return
    processes = ProcessGroup()
    try:
        yield processes
    except LmtrainError as error:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one is gone; we are leaving
        if not processes.tells(error):
            raise PeerError(error.exit_code) from None
        raise
    except Exception as error:
        processes.tells(error)  # by its traceback
        raise
    import torch.distributed as distributed

    distributed.destroy_process_group()


def require_equal(processes: SingleProcess, mine: Mapping[str, Any], words: str, kind: type[LmtrainError]) -> None:
    """Hold what should be the same in all processes against rank 0's.

    Args:
        words: what it says of a key that differs: `{key}`, `{mine}`, `{first}` are filled in.

    Raises:
        LmtrainError: of that kind, or a PeerError: it is not the same.
    """
    first = processes.share(dict(mine))

    def check() -> None:
        for key in [*first, *mine]:
            if mine.get(key) != first.get(key):
                raise kind(words.format(key=key, mine=mine.get(key), first=first.get(key)))

    processes.agree(check)
