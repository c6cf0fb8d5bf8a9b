"""Environment variables that libraries read once, when they start. Only the command line sets them."""

import os
import sys

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""With other values cuBLAS may sum in another order each time
(https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html). The command line takes the
first one: the second gives cuBLASLt less memory than it asks for, and PyTorch warns of that."""


def set_variables() -> None:
    """Set what cuBLAS and PyTorch have to find before they start, but leave what the user has set."""
    os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if sys.platform == "darwin":  # what PyTorch has not written for Apple's GPU then runs on the CPU, with a warning
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
