"""A trained run, ready for use from Python: `lmtrain.load(run)`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lmtrain.config import Config
from lmtrain.data.batching import Rows, sorted_batches
from lmtrain.data.corpus import Source, open_store
from lmtrain.data.preparation import source_of
from lmtrain.data.tokenizer import Tokenizer, normalise
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference import generation, scoring
from lmtrain.inference.generation import Generation
from lmtrain.inference.scoring import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.run import find_run, load_run
from lmtrain.runtime import choose_device

EVALUATION_TOKENS = 8192  # padded tokens a batch


class TrainedModel:
    """The best model of a run, its tokenizer and its configuration."""

    def __init__(self, run: Path, config: Config, tokenizer: Tokenizer, model: LanguageModel, step: int) -> None:
        self.run, self.config, self.tokenizer, self.model, self.step = run, config, tokenizer, model, step

    def generate(self, prompts: Sequence[str] = ("",), max_tokens: int | None = None) -> list[Generation]:
        """Continue each prompt greedily until its end token, at most `max_tokens` tokens (default: the config's).

        Raises:
            DataError: a run on ids, and a prompt that is not ids.
        """
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        return generation.generate(self.model, self.tokenizer, prompts, max_tokens=limit)

    def unknown_tokens(self, text: str) -> int:
        """How many of a text's tokens the vocabulary does not know."""
        return self.tokenizer.encode(normalise(text)).count(
            -1 if self.tokenizer.unk_id is None else self.tokenizer.unk_id
        )

    def evaluate(self, paths: Sequence[str] | None = None, batch_size: int | None = None) -> Evaluation:
        """Perplexity on the files named, else on the run's test set, else on its validation set.

        Args:
            batch_size: rows at once; the figures do not depend on it.

        Raises:
            DataError: a fault of the text, or no text at all.
        """
        with tempfile.TemporaryDirectory(prefix="lmtrain-") as scratch:
            store = open_store(self._source(paths), self.tokenizer, scratch)
            rows = Rows(store, self.config.batching.max_length)
            batches = sorted_batches(rows, EVALUATION_TOKENS, self.tokenizer.pad_id, batch_size)
            return scoring.evaluate(self.model, batches, store.counts)

    def _source(self, paths: Sequence[str] | None) -> Source:
        if paths:
            form = "ids" if self.tokenizer.kind == "ids" else self.config.data.format
            return Source.of(paths, format=form, jsonl_field=self.config.data.jsonl_field)
        try:
            own = source_of(self.config, "test") or source_of(self.config, "valid")
        except DataError as error:
            raise DataError(
                f"{error} (the run's own file, seen from this directory; name a file to evaluate)"
            ) from None
        if own is None:
            raise ConfigError("the run names neither a test nor a validation set; name a file to evaluate")
        return own


def load(
    run: str | Path | None = None, device: str = "auto", notify: Callable[[str], None] = lambda line: None
) -> TrainedModel:
    """Load a trained run: the directory named, else the newest under `runs/`.

    Args:
        device: auto, cpu or cuda.
        notify: called with a line on anything the user should know, such as a damaged checkpoint passed over.

    Raises:
        ConfigError: no run to be found, or no such device.
        ArtefactError: not a run, or one that is damaged.
    """
    loaded = load_run(find_run(run), choose_device(device), notify)
    return TrainedModel(loaded.run.path, loaded.config, loaded.tokenizer, loaded.model, loaded.step)
