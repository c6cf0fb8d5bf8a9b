"""Settings of generation and export with their checks. None needs torch, so the command line answers at once."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.errors import ConfigError

WIDEST = 1 << 16  # beams of one prompt
LARGEST_LENGTH_PENALTY = 10.0  # the length of the longest text to this power is still a number


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The settings take effect from the top down, each on what the one before has left.

    Raises:
        ConfigError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that stand in the text already are divided by this if positive, multiplied if negative
    (Keskar et al. 2019, https://arxiv.org/abs/1909.05858)."""
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens are kept."""
    top_p: float = 1.0
    """Only the most probable tokens that together hold this probability are kept (nucleus sampling, Holtzman et al.
    2020, https://arxiv.org/abs/1904.09751)."""
    min_p: float = 0.0
    """Only tokens of at least this fraction of the most probable one's probability are kept (Nguyen et al. 2024,
    https://arxiv.org/abs/2407.01082)."""
    seed: int = 0
    """The same seed, model and prompt give the same text, whatever else is in the batch."""

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "greater than 0 and finite"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or greater and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or greater"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed >= 0, "0 or greater"),
        ):
            if not valid:
                raise ConfigError(f"{name}: should be {wanted}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Beams:
    """How wide a beam search is, and how it ranks its texts.

    Raises:
        ConfigError: the width is not from 1 to 65536, or the penalty not from 0 to 10.
    """

    width: int
    """Hypotheses that are kept of each prompt; one that has reached its end keeps its place. 1 is greedy."""
    length_penalty: float = 0.0
    """Texts are ranked by log-probability / tokens ** length_penalty: 0 ranks by the text's probability, 1 by the mean
    log-probability of a token (Wu et al. 2016, https://arxiv.org/abs/1609.08144, use a similar one)."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= WIDEST:
            raise ConfigError(f"beams: should be from 1 to {WIDEST}, not {self.width}")
        if not 0 <= self.length_penalty <= LARGEST_LENGTH_PENALTY:
            most = f"{LARGEST_LENGTH_PENALTY:g}"
            raise ConfigError(f"length_penalty: should be from 0 to {most}, not {self.length_penalty}")


def check_generation(sampling: Sampling | None, beams: Beams | None, count: int, stop: Sequence[str]) -> None:
    """Raise ConfigError if settings of `TrainedModel.generate` contradict each other."""
    if not all(stop):
        raise ConfigError("stop: an empty text occurs everywhere; leave it out")
    if beams is not None and (sampling is not None or stop):
        raise ConfigError("beams: a search does not draw at random or stop at a text; leave out sampling and stop")
    if beams is not None and count > beams.width:
        raise ConfigError(f"count {count}: a search with {beams.width} beams finds at most {beams.width} texts")
    if count > 1 and beams is None and (sampling is None or sampling.temperature == 0):
        raise ConfigError(f"count {count}: only one text is the most probable; draw with a temperature or use beams")


def check_export(path: Path, format: str, int8: bool) -> None:
    """Raise ConfigError if `TrainedModel.export` can not write to this path, or not in this format."""
    check_new(path, "folder")
    if int8 and format == "safetensors":
        raise ConfigError("int8: safetensors holds the weights as they are; leave out int8, or export to onnx")


def check_new(path: Path, kind: str) -> None:
    """Raise ConfigError rather than overwrite what stands at `path`; kind is `file` or `folder`."""
    if os.path.lexists(path):
        raise ConfigError(f"{path}: already exists; name a new {kind}")
