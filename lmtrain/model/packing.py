"""The layout of a batch whose rows differ in length: their tokens are packed step by step.

Shapes: B rows, L longest row, N packed rows (the sum of the lengths).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """How B rows are packed: first all tokens of step 0, then all of step 1, as in PyTorch's `PackedSequence`.

    For example, rows of lengths 3, 1 have batch_sizes 2, 1, 1, and their N = 4 packed rows have time 0, 0, 1, 2 and row
    0, 1, 0, 0. The tensors are int64. `pack_rows` makes them on the CPU; `to` moves them to a model's device.
    """

    batch_sizes: list[int]  # (L,) number of rows that still run at each step
    offsets: list[int]  # (L,) packed row at which each step begins
    lengths: Tensor  # (B,) non-increasing, >= 1
    starts: Tensor  # (L,) the same numbers as `offsets`
    time: Tensor  # (N,) step of each packed row
    row: Tensor  # (N,) batch row of each packed row
    last: Tensor  # (B,) packed row of each row's last token

    @property
    def equal(self) -> bool:
        """Whether all rows have one length."""
        return self.batch_sizes[-1] == self.batch_sizes[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        return self.lengths, self.starts, self.time, self.row, self.last

    def reversed(self) -> Tensor:
        """Return the packed row (N,) that takes the place of each packed row when its row is read from the end."""
        return self.at(self.lengths[self.row] - 1 - self.time, self.row)

    def previous(self) -> Tensor:
        """Return the packed row one step earlier for each packed row after the first step, (N - B,)."""
        later = slice(self.batch_sizes[0], None)
        return self.at(self.time[later] - 1, self.row[later])

    def at(self, time: Tensor, row: Tensor) -> Tensor:
        """Return the packed row of each given step and row; arguments and result have one shape."""
        return self.starts[time] + row

    def to(self, device: torch.device) -> PackedRows:
        """Return the same packing with its tensors on a device."""
        return PackedRows(self.batch_sizes, self.offsets, *move_together(self.tensors, device))


def pack_rows(lengths: Tensor) -> PackedRows:
    """Lay out rows of the given lengths, (B,) int64 on CPU, longest first."""
    longest = int(lengths[0])
    steps = torch.arange(longest)
    sizes = torch.searchsorted(-lengths, -steps)  # number of rows with length > step, since lengths are sorted
    ends = sizes.cumsum(0)
    starts = ends - sizes
    time = torch.repeat_interleave(steps, sizes)
    row = torch.arange(len(time)) - starts[time]
    last = starts[lengths - 1] + torch.arange(len(lengths))
    return PackedRows(sizes.tolist(), starts.tolist(), lengths, starts, time, row, last)


def states_before(rows: PackedRows) -> Tensor:
    """Return the index (N,) of the state before each packed row, in a buffer of B initial and N packed states."""
    before = rows.starts.roll(1).add_(rows.batch_sizes[0])  # where the states of the step before each step begin
    before[:1] = 0
    return before[rows.time] + rows.row


def move_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move int64 tensors (any shapes) to a device in one copy, and return them there.

    On CUDA the copy is made from pinned memory, so the program waits neither for the copy nor for earlier work of the
    device; PyTorch keeps that memory until the copy is made. Work that any thread queues later on the same stream
    finds the tensors complete.
    """
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    sizes = [tensor.numel() for tensor in tensors]
    pinned = device.type == "cuda"
    buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=pinned)
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=buffer)
    moved = buffer.to(device, non_blocking=pinned).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(moved, tensors, strict=True)]
