"""Loads the trained model of a run directory, with the configuration and the tokenizer that belong to it."""

from typing import Any

import torch

from lmtrain.config import Config
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs import checkpoint
from lmtrain.runs.checkpoint import INFERENCE_FILES, MODEL_FILE, STATE_FILE
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.ngram_counts import COUNTS_FILE, read_counts
from lmtrain.runs.tensor_file import SavedFile, TensorSpec
from lmtrain.runs.weights import build_empty_model, check_weights, named_weights, weight_specs
from lmtrain.system.console import Notify


def load_run(run: RunDirectory, device: torch.device, notify: Notify) -> tuple[Config, Tokenizer, LanguageModel, int]:
    """Load the best model of a run, or else its last one, in evaluation mode; damaged checkpoints are skipped.

    Args:
        notify: is called with a line on each damaged checkpoint.

    Returns:
        The configuration, the tokenizer, the model, and the step of the checkpoint that its weights come from.

    Raises:
        ArtefactError: no checkpoint is whole, or the files of the run don't belong together.
    """
    config, tokenizer = run.config_and_tokenizer()
    specs = weight_specs(config, tokenizer.vocab_size)

    def read(step: int) -> tuple[LanguageModel, dict[str, Any], int]:
        files, state = open_weights(run, tokenizer, step, specs, INFERENCE_FILES)
        model = build_empty_model(config, tokenizer.vocab_size)
        files[MODEL_FILE].read_tensors(named_weights(model), finite="")
        return model, state, step

    loaded = checkpoint.load_first_whole(run.candidates(), read, notify)
    if loaded is None:
        raise ArtefactError(f"{run.path}: no checkpoint yet; train the run further with --resume")
    model, state, step = loaded
    if config.model.ngram_counts is not None:
        model.load_counts(read_counts(run.path / COUNTS_FILE, state.get("counts"), config, tokenizer))
    return config, tokenizer, model.to(device).eval(), step


def open_weights(
    run: RunDirectory, tokenizer: Tokenizer, step: int, specs: dict[str, TensorSpec], parts: tuple[str, ...]
) -> tuple[dict[str, SavedFile], dict[str, Any]]:
    """Check that the weights and the state of a checkpoint belong to the run, before memory is taken for the weights.

    Args:
        specs: the weights that the run's configuration asks for, from `weight_specs`.
        parts: the files of the checkpoint that are wanted.

    Returns:
        These files, whose tensors are not read yet, and the state.

    Raises:
        ArtefactError: a file is damaged, or belongs to another configuration or tokenizer.
    """
    files = checkpoint.read_headers(run.checkpoints, step, parts)
    check_weights(files[MODEL_FILE].specs, specs, str(files[MODEL_FILE].path))
    state = files[STATE_FILE].read_json()
    if state.get("tokenizer") != tokenizer.fingerprint():
        directory = checkpoint.directory_of(run.checkpoints, step)
        raise ArtefactError(f"{directory}: was trained with another tokenizer than the run's tokenizer.json")
    return files, state
