"""Loads the trained model of a run directory, with the configuration and the tokenizer that belong to it."""

import torch

from lmtrain.config import Config
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ArtefactError
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs import checkpoint
from lmtrain.runs.checkpoint import INFERENCE_FILES, MODEL_FILE, Checkpoint, TensorSpec
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.ngram_counts import COUNTS_FILE, read_counts
from lmtrain.runs.weights import build_model, check_finite, check_weights, load_weights, weight_specs
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
    saved = checkpoint.load_first_whole(
        run.candidates(), lambda step: read_weights(run, tokenizer, step, specs), notify
    )
    if saved is None:
        raise ArtefactError(f"{run.path}: no checkpoint yet; train the run further with --resume")
    with torch.random.fork_rng(devices=[]):  # the start values, which the saved weights replace, are drawn
        model = build_model(config, tokenizer.vocab_size)
    load_weights(model, saved.model)
    if config.model.ngram_counts is not None:
        model.load_counts(read_counts(run.path / COUNTS_FILE, saved.state.get("counts"), config, tokenizer))
    return config, tokenizer, model.to(device).eval(), saved.step


def read_weights(run: RunDirectory, tokenizer: Tokenizer, step: int, specs: dict[str, TensorSpec]) -> Checkpoint:
    """Read the weights and the state of a checkpoint, and check that they belong to the run.

    Their shapes are checked before memory is taken for them.

    Args:
        specs: the weights that the run's configuration asks for, from `weight_specs`.

    Returns:
        The checkpoint without its training tensors.

    Raises:
        ArtefactError: a file is damaged, or belongs to another configuration or tokenizer.
    """
    directory = checkpoint.directory_of(run.checkpoints, step)
    weights_file = str(directory / MODEL_FILE)
    headers = checkpoint.read_headers(run.checkpoints, step, INFERENCE_FILES)
    check_weights(headers[MODEL_FILE], specs, weights_file)
    saved = checkpoint.load(run.checkpoints, step, INFERENCE_FILES)
    check_finite(saved.model, weights_file)
    if saved.state.get("tokenizer") != tokenizer.fingerprint():
        raise ArtefactError(f"{directory}: was trained with another tokenizer than the run's tokenizer.json")
    return saved
