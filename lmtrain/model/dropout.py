"""Dropout, with random numbers that cost a quarter of PyTorch's on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def drop(values: Tensor, share: float, training: bool) -> Tensor:
    """Zero this share of the values at random and scale the others up, so that their mean stays; in training only.

    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html. On CPU the share is rounded to
    1 / 65,536: 64 random bits decide on four values.
    """
    if not training or not share:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, share)
    zeroed = min(round(share * 65536), 65535)
    count = values.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(values.shape) >= zeroed - 32768
    return values * (kept * (65536 / (65536 - zeroed)))
