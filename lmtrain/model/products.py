"""Matrix products, and how precise they are: the one place that asks autocast.

Under autocast each product is rounded to bf16, its operands going in and its result coming out. What is kept stays in
fp32: weights, their gradients, states and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(inputs: Tensor) -> torch.dtype:
    """bf16 under autocast, else the inputs' own."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def write_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left @ right; `out` may be of another dtype."""
    return torch.mm(left, right, out=out) if out.dtype == right.dtype else out.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right; `total` may be of another dtype."""
    return total.addmm_(left, right) if total.dtype == right.dtype else total.add_(left @ right)


def room_for(rows: int) -> int:
    """How many rows a rounded operand of N rows should have, the ones behind being zeros: a multiple of 64.

    oneDNN prepares a bf16 product anew for each N, which takes longer than the product; so N is one of few.
    """
    return -(-rows // 64) * 64


class StepWeight:
    """A weight (K, M) that is multiplied from the left at each of many steps, prepared once.

    In fp32 its rows are laid out one after the other, which is up to three times as fast as columns where two threads
    share a product of few rows. A weight of bf16, or a large one that lies in columns, goes to oneDNN's own blocked
    layout, which a plain product would make anew each time.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.packed: Tensor | None = None
        columns = weight.t()  # (M, K), as oneDNN wants it
        large = dtype == torch.float32 and weight.numel() >= 1 << 20 and columns.is_contiguous()
        if weight.device.type == "cpu" and (large or dtype == torch.bfloat16) and _onednn(dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(columns.to(dtype).contiguous(), rows)
        else:
            self.weight = weight.to(dtype).contiguous()

    def add_to(self, total: Tensor, left: Tensor) -> None:
        """total (B, M) += left (B, K) @ weight, `left` being in the dtype of the product."""
        if self.packed is None:
            add_product(total, left, self.weight)
        else:
            total.add_(torch.ops.mkldnn._linear_pointwise(left, self.packed, None, "none", [], ""))


def _onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
