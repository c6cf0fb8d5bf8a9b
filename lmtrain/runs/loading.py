"""From a run directory to its trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lmtrain.config import Config
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import USED, RunDirectory, check_tokenizer, unusable
from lmtrain.runs.ngram_counts import COUNTS_FILE, read_counts
from lmtrain.runs.weights import build_model, check_finite, check_weights, load_weights, weight_specs


class LoadedRun(NamedTuple):
    """A trained model as it comes out of its run."""

    run: RunDirectory
    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    step: int


def load_run(run: RunDirectory, device: torch.device, notify: Callable[[str], None]) -> LoadedRun:
    """The run's best model, else its last one, in evaluation mode; a damaged checkpoint is passed over and named.

    Raises:
        ArtefactError: no checkpoint that is whole, or files that don't fit together.
    """
    config, tokenizer = run.config_and_tokenizer()
    wanted = weight_specs(config, tokenizer.vocab_size)
    problems: list[str] = []
    if not run.candidates():
        raise ArtefactError(f"{run.path}: no checkpoint yet; train it further with --resume")
    for step in run.candidates():
        name = str(checkpoint.home_of(run.checkpoints, step) / "model.safetensors")
        try:
            check_weights(checkpoint.read_headers(run.checkpoints, step, USED)["model.safetensors"], wanted, name)
            saved = checkpoint.load(run.checkpoints, step, USED)
            check_finite(saved.model, name)
            check_tokenizer(tokenizer, saved.state, name)
        except checkpoint.NewerFormatError:
            raise
        except ArtefactError as error:
            problems.extend(error.faults)
            continue
        for problem in problems:
            notify(f"passed over: {problem}")
        model = build_model(config, tokenizer.vocab_size)
        load_weights(model, saved.model)
        if config.model.ngram_counts is not None:
            model.load_counts(read_counts(run.path / COUNTS_FILE, saved.state.get("counts"), config, tokenizer))
        return LoadedRun(run, config, tokenizer, model.to(device).eval(), step)
    raise unusable(problems)
