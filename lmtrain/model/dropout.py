"""Dropout in its several kinds, with random numbers that cost a quarter of PyTorch's on a CPU.

Shapes: B rows, N packed rows, F features, V vocabulary. Whatever the kind, what is kept is scaled up so that the mean
stays, and nothing is drawn where the share is 0 or the model is not in training.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmtrain.model.packing import PackedRows


def drop(values: Tensor, share: float, training: bool) -> Tensor:
    """Zero this share of the values at random, each by itself.

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


def drop_locked(values: Tensor, rows: PackedRows, share: float, training: bool) -> Tensor:
    """Zero the same features (N, F) at every step of a row, others in another row: locked or variational dropout.

    Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287.
    """
    if not training or not share:
        return values
    count = rows.batch_sizes[0]
    kept = drop(values.new_ones(count, values.shape[1]), share, training)  # (B, F)
    if rows.equal:
        columns: Tensor = values.unflatten(0, (-1, count)) * kept
        return columns.flatten(0, 1)
    return values * kept.index_select(0, rows.row.to(values.device))


def drop_words(embedded: Tensor, tokens: Tensor, vocab_size: int, share: float, training: bool) -> Tensor:
    """Zero the vectors (N, F) of a share of the vocabulary, wherever these tokens (N,) stand in the batch.

    Gal and Ghahramani 2016, as above; "embedding dropout" in Merity et al. 2018, https://arxiv.org/abs/1708.02182.
    """
    if not training or not share:
        return embedded
    kept = drop(embedded.new_ones(vocab_size), share, training)
    return embedded * kept.index_select(0, tokens).unsqueeze(1)
