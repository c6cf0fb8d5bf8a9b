"""The layout of a batch whose rows differ in length: their tokens are packed step by step.

Shapes: B rows, L longest row, N packed rows (the sum of the lengths).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """The layout of B rows: first all tokens of step 0, then all of step 1, as in PyTorch's `PackedSequence`.

    For example, rows of lengths 3, 1 have batch_sizes 2, 1, 1, and their N = 4 packed rows have time 0, 0, 1, 2 and row
    0, 1, 0, 0.
    """

    lengths: Tensor  # (B,) int64 on CPU, non-increasing, >= 1
    batch_sizes: list[int]  # (L,) number of rows that still run at each step
    offsets: list[int]  # (L,) packed row at which each step begins
    time: Tensor  # (N,) step of each packed row
    row: Tensor  # (N,) batch row of each packed row
    last: Tensor  # (B,) packed row of each row's last token

    @property
    def equal(self) -> bool:
        """Whether all rows have one length."""
        return self.batch_sizes[-1] == self.batch_sizes[0]

    def reversed(self) -> Tensor:
        """Return the packed row (N,) that takes the place of each packed row when its row is read from the end."""
        return self.at(self.lengths[self.row] - 1 - self.time, self.row)

    def previous(self) -> Tensor:
        """Return the packed row one step earlier for each packed row after the first step, (N - B,)."""
        later = slice(self.batch_sizes[0], None)
        return self.at(self.time[later] - 1, self.row[later])

    def at(self, time: Tensor, row: Tensor) -> Tensor:
        """Return the packed row of each given step and row; arguments and result have one shape and are on CPU."""
        return torch.tensor(self.offsets)[time] + row


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
    return PackedRows(lengths, sizes.tolist(), starts.tolist(), time, row, last)


def states_before(rows: PackedRows, device: torch.device) -> Tensor:
    """Return the index (N,) of the state before each packed row, in a buffer of B initial and N packed states."""
    count = rows.batch_sizes[0]
    starts = torch.tensor([0, *(count + offset for offset in rows.offsets[:-1])])
    return (starts[rows.time] + rows.row).to(device)
