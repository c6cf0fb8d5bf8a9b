"""An exported model in 8 bits, and what that changes: size, speed and perplexity."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from lmtrain.metrics import Tally


class OnnxSteps:
    """An exported model at work, as `onnxruntime` runs it."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def begin(self, rows: int) -> dict[str, np.ndarray]:
        """States of zeros."""
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        _, *states = self.session.get_inputs()
        return {state.name: np.zeros((rows, state.shape[1]), kinds[state.type]) for state in states}

    def step(self, tokens: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read a token (B,) of each row: log-probabilities (B, V) of the next ones, and the state."""
        log_probabilities, *after = self.session.run(None, {"token": tokens, **state})
        return log_probabilities, dict(zip(state, after, strict=True))


def quantised(content: bytes, scratch: Path) -> bytes:
    """The same model with weights in 8 bits, their products in whole numbers; activations are measured as they come."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it advises on what does not matter here
    before, after = scratch / "fp32.onnx", scratch / "int8.onnx"
    before.write_bytes(content)
    quantize_dynamic(before, after, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    return after.read_bytes()


def log_probability(steps: OnnxSteps, ids: Sequence[int]) -> float:
    """Of ids given the first of them, token by token."""
    state, total = steps.begin(1), 0.0
    for token, following in pairwise(ids):
        found, state = steps.step(np.array([token], np.int64), state)
        total += float(found[0, following])
    return total


def compare(before: bytes, after: bytes, rows: Sequence[list[int]]) -> list[str]:
    """Lines that say what 8 bits change: size, speed on one text at a time, and perplexity.

    Args:
        before, after: the ONNX model as it is, and in 8 bits.
        rows: ids of some texts, start and end tokens included.
    """
    told = [f"int8: {len(before) / 1e6:.1f} MB -> {len(after) / 1e6:.1f} MB"]
    if not rows:
        return [*told, "int8: speed and perplexity are not measured: the run's own text is not here"]
    rates, perplexities = [], []
    for content in (before, after):
        steps, tally = OnnxSteps(content), Tally()
        start_s = time.perf_counter()
        for row in rows:
            tally.add(-log_probability(steps, row), len(row) - 1)
        rates.append(tally.tokens / (time.perf_counter() - start_s))
        perplexities.append(tally.perplexity)
    return [
        *told,
        f"int8: {rates[0]:,.0f} -> {rates[1]:,.0f} tokens/s, one text at a time, one thread",
        f"int8: perplexity {perplexities[0]:.4f} -> {perplexities[1]:.4f} on {tally.tokens:,} tokens of its text",
    ]
