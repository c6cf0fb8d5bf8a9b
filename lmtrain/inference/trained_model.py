"""A trained run, ready for use from Python: `lmtrain.load(run)`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lmtrain.config import Config
from lmtrain.data.corpus import Source, open_store
from lmtrain.data.preparation import evaluation_batches, source_of
from lmtrain.data.tokenizer import Tokenizer, normalise
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference import generation, scoring
from lmtrain.inference.adaptation import Cache, Dynamic, evaluate_dynamically, evaluate_with_cache
from lmtrain.inference.generation import Generation
from lmtrain.inference.scoring import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.run import find_run, load_run
from lmtrain.runtime import choose_device


class TrainedModel:
    """The best model of a run, its tokenizer and its configuration."""

    def __init__(self, run: Path, config: Config, tokenizer: Tokenizer, model: LanguageModel, step: int) -> None:
        self.run, self.config, self.tokenizer, self.model, self.step = run, config, tokenizer, model, step

    def generate(self, prompts: Sequence[str] = ("",), max_tokens: int | None = None) -> list[Generation]:
        """Continue each prompt greedily until its end token, at most `max_tokens` tokens (default: the config's).

        A run on a stream goes on behind the end of a line, until `max_tokens`.

        Raises:
            DataError: a run on ids, and a prompt that is not ids.
        """
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        stream = self.config.batching.mode == "stream"
        return generation.generate(self.model, self.tokenizer, prompts, max_tokens=limit, stream=stream)

    def unknown_tokens(self, text: str) -> int:
        """How many of a text's tokens the vocabulary does not know; in a stream a newline is an end token."""
        lines = normalise(text).split("\n") if self.config.batching.mode == "stream" else [normalise(text)]
        unknown = -1 if self.tokenizer.unk_id is None else self.tokenizer.unk_id
        return sum(self.tokenizer.encode(line).count(unknown) for line in lines)

    def evaluate(
        self,
        paths: Sequence[str] | None = None,
        batch_size: int | None = None,
        cache: Cache | None = None,
        dynamic: Dynamic | None = None,
    ) -> Evaluation:
        """Perplexity on the files named, else on the run's test set, else on its validation set.

        A text that goes on (stream, carry_state) is read in one column, its state carried from end to end.

        Args:
            batch_size: rows at once, of a text whose rows begin anew; the figures do not depend on it.
            cache, dynamic: score a text that goes on in these ways, too; the result has them beside the plain figures.

        Raises:
            ConfigError: what does not go with how this run reads text.
            DataError: a fault of the text, or no text at all.
        """
        goes_on = self.config.batching.goes_on
        if goes_on and batch_size is not None:
            raise ConfigError("batch_size: this run carries its state from row to row, and reads one row at a time")
        if not goes_on and (cache is not None or dynamic is not None):
            raise ConfigError(
                "cache and dynamic evaluation want a text that goes on, and this run begins anew at each line "
                "(batching.mode: stream, or batching.carry_state: true, would not)"
            )
        with tempfile.TemporaryDirectory(prefix="lmtrain-") as scratch:
            store = open_store(self._source(paths), self.tokenizer, scratch)
            batches, columns = evaluation_batches(self.config, store, self.tokenizer, 1, batch_size)
            result = scoring.evaluate(self.model, batches, columns, store.counts)
            if cache is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1)
                result.adapted["cache"] = evaluate_with_cache(self.model, batches, cache)
            if dynamic is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1, steps=dynamic.steps)
                result.adapted["dynamic"] = evaluate_dynamically(self.model, batches, dynamic)
            return result

    def _source(self, paths: Sequence[str] | None) -> Source:
        if paths:
            form = "ids" if self.tokenizer.kind == "ids" else self.config.data.format
            stream = self.config.batching.mode == "stream"
            return Source.of(paths, format=form, jsonl_field=self.config.data.jsonl_field, stream=stream)
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
