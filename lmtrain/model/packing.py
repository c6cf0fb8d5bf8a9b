"""Where the tokens of a batch of ragged rows lie when they are packed time step by time step.

Shapes: B rows, L longest row, N packed rows (the sum of the lengths).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """Where the tokens of B rows lie when packed time step by time step, as in `PackedSequence`."""

    lengths: Tensor  # (B,) int64 on CPU, non-increasing, >= 1
    batch_sizes: list[int]  # (L,) rows that still run at each step
    offsets: list[int]  # (L,) where each step begins among the packed rows
    time: Tensor  # (N,) the step of each packed row
    row: Tensor  # (N,) the batch row of each packed row
    last: Tensor  # (B,) the packed row of each row's last token

    @property
    def equal(self) -> bool:
        """Whether all rows are of one length."""
        return self.batch_sizes[-1] == self.batch_sizes[0]

    def reversed(self) -> Tensor:
        """The packed row that holds the same place of the row read from its end, (N,)."""
        return self.at(self.lengths[self.row] - 1 - self.time, self.row)

    def previous(self) -> Tensor:
        """The packed row one step before each of those that have one, which are all but the first B, (N - B,)."""
        later = slice(self.batch_sizes[0], None)
        return self.at(self.time[later] - 1, self.row[later])

    def at(self, time: Tensor, row: Tensor) -> Tensor:
        """The packed rows of the given steps of the given rows; all index tensors on CPU."""
        return torch.tensor(self.offsets)[time] + row


def pack_rows(lengths: Tensor) -> PackedRows:
    """Lay out rows of the given lengths, (B,) int64 on CPU, longest first."""
    longest = int(lengths[0])
    steps = torch.arange(longest)
    sizes = torch.searchsorted(-lengths, -steps)  # rows with length > step, lengths being sorted
    ends = sizes.cumsum(0)
    starts = ends - sizes
    time = torch.repeat_interleave(steps, sizes)
    row = torch.arange(len(time)) - starts[time]
    last = starts[lengths - 1] + torch.arange(len(lengths))
    return PackedRows(lengths, sizes.tolist(), starts.tolist(), time, row, last)


def states_before(rows: PackedRows, device: torch.device) -> Tensor:
    """Where the state before each packed row lies in a buffer of the B initial states and the N packed ones, (N,)."""
    count = rows.batch_sizes[0]
    starts = torch.tensor([0, *(count + offset for offset in rows.offsets[:-1])])
    return (starts[rows.time] + rows.row).to(device)
