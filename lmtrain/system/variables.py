"""Environment variables that libraries read once, when they start. Only the command line sets them."""

import os
import sys

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":16:8"
"""With other values cuBLAS may sum in another order each time. PyTorch's page on recurrent networks names this one and
:4096:2 (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html); its deterministic algorithms take this one
and :4096:8 (https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html)."""


def set_variables() -> None:
    """Set what cuBLAS and PyTorch have to find before they start, but leave what the user has set."""
    os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACE)
    if sys.platform == "darwin":  # what PyTorch has not written for Apple's GPU then runs on the CPU, with a warning
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
