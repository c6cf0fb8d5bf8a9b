"""Matrix products and their precision: the only file that asks whether autocast is on.

Under autocast the operands and the result of each product are rounded to bf16. What is kept stays in float32: weights,
their gradients, states and sums.

Shapes: B rows, N packed rows, X and Y the inner and the outer size of a product.
"""

import torch
from torch import Tensor


def product_dtype(inputs: Tensor) -> torch.dtype:
    """Return the dtype of products: bf16 under autocast, else that of the inputs."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def write_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out (N, Y) = left (N, X) @ right (X, Y); `out` may have another dtype."""
    return torch.mm(left, right, out=out) if out.dtype == right.dtype else out.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (N, Y) += left (N, X) @ right (X, Y); `total` may have another dtype."""
    return total.addmm_(left, right) if total.dtype == right.dtype else total.add_(left @ right)


def padded_rows(rows: int) -> int:
    """Round a number of rows up to a multiple of 64; zeros fill up a bf16 operand to it. oneDNN prepares a bf16 product
    anew for each new number of rows, which takes longer than the product, so few different numbers should occur."""
    return -(-rows // 64) * 64


class StepWeight:
    """A weight (X, Y) that is multiplied from the left at each of many steps, and prepared once.

    In float32 its rows are laid out one after the other, which is up to three times as fast as columns where two
    threads work on a product of few rows. A bf16 weight, or a large one that lies in columns, is converted to oneDNN's
    blocked layout (for products of some B = `rows` rows); a plain product would convert it at each step.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.packed: Tensor | None = None
        columns = weight.t()  # (Y, X), as oneDNN expects it
        large = dtype == torch.float32 and weight.numel() >= 1 << 20 and columns.is_contiguous()
        if weight.device.type == "cpu" and (large or dtype == torch.bfloat16) and has_onednn(dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(columns.to(dtype).contiguous(), rows)
        else:
            self.weight = weight.to(dtype).contiguous()

    def add_to(self, total: Tensor, left: Tensor) -> None:
        """total (B, Y) += left (B, X) @ weight, where `left` has the dtype of the product."""
        if self.packed is None:
            add_product(total, left, self.weight)
        else:
            total.add_(torch.ops.mkldnn._linear_pointwise(left, self.packed, None, "none", [], ""))


def has_onednn(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies matrices of this dtype on this processor. PyTorch's own bf16 products, without it,
    are some fifty times as slow as float32 ones."""
    available: bool = torch.backends.mkldnn.is_available()
    return available and (dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
