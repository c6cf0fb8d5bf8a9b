"""Turns an exported model into one of 8 bits, and measures what that changes: size, speed and perplexity.

Shapes: B rows, V vocabulary.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from lmtrain.metrics import Tally


class OnnxSteps:
    """Runs an exported model with `onnxruntime`, one token of each row at a time."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def begin(self, rows: int) -> dict[str, np.ndarray]:
        """Return the state before the first token: input name -> zeros (rows, size)."""
        dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        _, *states = self.session.get_inputs()
        return {state.name: np.zeros((rows, state.shape[1]), dtypes[state.type]) for state in states}

    def step(self, tokens: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read one token of each row (B,); returns log-probabilities (B, V) of the next tokens, and the new state."""
        log_probabilities, *after = self.session.run(None, {"token": tokens, **state})
        return log_probabilities, dict(zip(state, after, strict=True))


def quantised(content: bytes, scratch: Path) -> bytes:
    """Return the ONNX model with weights in 8 bits and integer products; activations are quantised in each step."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it gives advice that does not apply here
    before, after = scratch / "fp32.onnx", scratch / "int8.onnx"
    before.write_bytes(content)
    quantize_dynamic(before, after, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    return after.read_bytes()


def log_probability(steps: OnnxSteps, ids: Sequence[int]) -> float:
    """Return the natural logarithm of the probability of ids given the first of them."""
    state, total = steps.begin(1), 0.0
    for token, following in pairwise(ids):
        log_probabilities, state = steps.step(np.array([token], np.int64), state)
        total += float(log_probabilities[0, following])
    return total


def compare(before: bytes, after: bytes, rows: Sequence[list[int]]) -> list[str]:
    """Return lines that say what 8 bits change: size, speed on one text at a time, and perplexity.

    Args:
        before, after: the ONNX model in 32 bits, and in 8 bits.
        rows: ids of some texts, start and end tokens included.
    """
    sizes = f"int8: {len(before) / 1e6:.1f} MB -> {len(after) / 1e6:.1f} MB"
    if not rows:
        return [sizes, "int8: speed and perplexity are not measured: the run's own text is not here"]
    rates, perplexities = [], []
    for content in (before, after):
        steps, tally = OnnxSteps(content), Tally()
        start_s = time.perf_counter()
        for row in rows:
            tally.add(-log_probability(steps, row), len(row) - 1)
        rates.append(tally.tokens / (time.perf_counter() - start_s))
        perplexities.append(tally.perplexity)
    return [
        sizes,
        f"int8: {rates[0]:,.0f} -> {rates[1]:,.0f} tokens/s, one text at a time, one thread",
        f"int8: perplexity {perplexities[0]:.4f} -> {perplexities[1]:.4f} on {tally.tokens:,} tokens of its text",
    ]
