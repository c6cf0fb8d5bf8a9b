"""The kinds of dropout, with random numbers that cost a quarter of PyTorch's on a CPU.

Each kind scales up what it keeps, so that the mean stays the same. Nothing is drawn when the fraction is 0 or the model
is not in training.

Shapes: B rows, F features, N packed rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lmtrain.model.packing import PackedRows


def drop(values: Tensor, fraction: float, training: bool) -> Tensor:
    """Zero this fraction of the values (any shape), each independently.

    Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html. On CPU the fraction is rounded to a multiple
    of 1 / 65,536, since 64 random bits decide about four values.
    """
    if not training or not fraction:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, fraction)
    zeroed = min(round(fraction * 65536), 65535)
    count = values.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(values.shape) >= zeroed - 32768
    return values * (kept * (65536 / (65536 - zeroed)))


def drop_locked(values: Tensor, rows: PackedRows, fraction: float, training: bool) -> Tensor:
    """Zero the same features of `values` (N, F) at every step of a row; other rows lose other features.

    This is called locked or variational dropout: Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287.
    """
    if not training or not fraction:
        return values
    count = rows.batch_sizes[0]
    kept = drop(values.new_ones(count, values.shape[1]), fraction, training)  # (B, F)
    if rows.equal:
        columns: Tensor = values.unflatten(0, (-1, count)) * kept
        return columns.flatten(0, 1)
    return values * kept.index_select(0, rows.row)


def drop_tokens(embedded: Tensor, tokens: Tensor, vocab_size: int, fraction: float, training: bool) -> Tensor:
    """Zero the embeddings (N, F) of a fraction of the vocabulary, wherever these tokens (N,) occur in the batch.

    Gal and Ghahramani 2016, as above; "embedding dropout" in Merity et al. 2018, https://arxiv.org/abs/1708.02182.
    """
    if not training or not fraction:
        return embedded
    kept = drop(embedded.new_ones(vocab_size), fraction, training)
    return embedded * kept.index_select(0, tokens).unsqueeze(1)
