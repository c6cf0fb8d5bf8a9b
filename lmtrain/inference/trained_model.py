"""A trained run, ready for use from Python: `lmtrain.load(run)`."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from lmtrain.config import Config
from lmtrain.data.batches.loader import evaluation_batches
from lmtrain.data.preparation import source_of
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference import generation, scoring
from lmtrain.inference.adaptation import Cache, Dynamic, evaluate_dynamically, evaluate_with_cache
from lmtrain.inference.beam import Beams, beam_search
from lmtrain.inference.export.folder import export_model
from lmtrain.inference.filling import Filling, fill_blank
from lmtrain.inference.generation import Generation
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.sampling import Sampling
from lmtrain.inference.scoring import Evaluation, Score
from lmtrain.inference.vectors import embed, save_vectors
from lmtrain.model.language_model import LanguageModel
from lmtrain.runs.directory import RunDirectory, find_run
from lmtrain.runs.loading import load_run
from lmtrain.system.device import choose_device

LINES_AT_ONCE = 4096
COMPARED_TOKENS = 5000


class TrainedModel:
    """The best model of a run, its tokenizer and its configuration."""

    def __init__(self, run: Path, config: Config, tokenizer: Tokenizer, model: LanguageModel, step: int) -> None:
        self.run, self.config, self.tokenizer, self.model, self.step = run, config, tokenizer, model, step

    def generate(
        self,
        prompts: Sequence[str] = ("",),
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        beams: Beams | None = None,
        count: int = 1,
        stop: Sequence[str] = (),
        backward: bool = False,
    ) -> list[Generation]:
        """Continue each prompt until its end token, at most `max_tokens` tokens (default: the config's).

        A run on a stream goes on behind the end of a line, until `max_tokens`.

        Args:
            sampling: draw tokens at random; None: take the most probable one.
            beams: search for the most probable text.
            count: texts to each prompt, one after the other: drawn anew, or the best of a search.
            stop: texts that end a completion, and are cut off.
            backward: write what comes before the prompts.

        >>> [each.text for each in model.generate(["a", "b"], max_tokens=0)]
        ['a', 'b']
        >>> drawn = model.generate(["a"], sampling=lmtrain.Sampling(temperature=0.7, top_k=5, seed=1), count=3)
        >>> [each.prompt for each in drawn]
        ['a', 'a', 'a']

        Raises:
            ConfigError: settings that do not go together, or with this run.
            DataError: a run on ids, and a prompt that is not ids.
        """
        script = self._script("backward" if backward else "forward")
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        if count > 1 and beams is None and (sampling is None or sampling.temperature == 0):
            raise ConfigError(
                f"count {count}: the most probable text is one; draw at random (temperature), or use beams"
            )
        if beams is None:
            return generation.generate(
                self.model, script, prompts, max_tokens=limit, sampling=sampling, count=count, stop=stop
            )
        if sampling is not None or stop:
            raise ConfigError("beams: a search draws nothing at random and has no text to stop at; leave those out")
        if count > beams.width:
            raise ConfigError(f"count {count}: a search of {beams.width} beams finds no more than {beams.width} texts")
        return beam_search(self.model, script, prompts, max_tokens=limit, beams=beams, count=count)

    def stream(
        self,
        prompt: str = "",
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The completion of one prompt as it comes, in whole characters; arguments as `generate`.

        >>> "".join(model.stream("a")) == model.generate(["a"])[0].completion
        True
        """
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        script = self._script("forward")
        return generation.stream(self.model, script, prompt, max_tokens=limit, sampling=sampling, stop=stop)

    def score(
        self,
        texts: Iterable[str] | Iterable[Block],
        direction: Literal["forward", "backward", "both"] = "forward",
        each: bool = False,
    ) -> Iterator[Score]:
        """How probable each text is, one after the other, in memory that does not grow with their number.

        Args:
            texts: a line each, or blocks of lines as `read_lines_of` gives them.
            direction: both: the mean of the two log-probabilities.
            each: give every token's own, too; of one direction.

        >>> [(each.line, each.tokens) for each in model.score(["a b", "c"])]  # end tokens counted
        [(1, 3), (2, 2)]

        Raises:
            ConfigError: a direction that the run does not have, or `each` of both.
            DataError: a run on ids, and a text that is not ids.
        """
        if direction == "both" and each:
            raise ConfigError("a token's own log-probability is one direction's: forward or backward")
        script = self._script("forward" if direction == "forward" else "backward")
        length = self.config.batching.max_length
        return scoring.score(self.model, script, _blocks(texts), direction=direction, each=each, max_length=length)

    def embed(self, texts: Iterable[str] | Iterable[Block], path: str | Path) -> int:
        """Write the vectors of each text to an .npz file that `numpy.load` reads; returns how many texts there were.

        The file holds `ids` (T,), `lengths` (texts,), `output` (T, D*H), the last layer's state after each token, and
        `h_n` (texts, num_layers*D, H), T being the tokens of all texts; see `lmtrain.inference.vectors.Vectors`.

        >>> model.embed(["a b", "c"], "vectors.npz")
        2
        >>> numpy.load("vectors.npz")["output"].shape  # three tokens, two directions of 8
        (3, 16)

        Raises:
            ConfigError: the file is there already, or the run's layers differ in size.
            DataError: a run on ids, and a text that is not ids.
        """
        return save_vectors(path, embed(self.model, self._script("forward"), _blocks(texts)))

    def export(
        self, path: str | Path, format: Literal["onnx", "safetensors"] = "onnx", int8: bool = False
    ) -> list[str]:
        """Write the model for other programs into a new folder, with its tokenizer.json; returns what to tell of it.

        Args:
            format: onnx: model.onnx, one step of the forward direction with its state in and out (`onnx_model` has its
                inputs and outputs). safetensors: model.safetensors, weights by the names of torch.nn (`torch_weights`).
            int8: with onnx: products in 8-bit whole numbers; size, speed and change in perplexity are measured.

        >>> model.export("weights", "safetensors")
        ['weights/model.safetensors: 24 tensors']

        Raises:
            ConfigError: the folder is there already, a package is missing, or a model that has no such form.
        """
        first_rows = self._first_rows(COMPARED_TOKENS) if int8 else ()
        return export_model(self.model, self.tokenizer, Path(path), format, int8, first_rows)

    def _first_rows(self, tokens: int) -> Iterator[list[int]]:
        """The first rows of the text that `evaluate` reads, each with its start and its end; a stream is one row."""
        script = self._script("forward")
        row, stream = [script.start], script.stream
        try:
            for block in self._source(None).blocks():
                for text in block.texts:
                    if not stream and not text.strip():
                        continue
                    ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
                    row, tokens = [*row, *ids], tokens - len(ids)
                    if not stream or tokens <= 0:
                        yield row
                        row = row[:1]
                    if tokens <= 0:
                        return
        except (ConfigError, DataError):
            return  # a run that was copied elsewhere, without its text
        if len(row) > 1:
            yield row

    def fill(self, text: str, top: int = 5, tokens: int = 1) -> list[Filling]:
        """The best fillings of the blank `____`, best first, of up to so many tokens.

        >>> best, second = model.fill("a ____ b", top=2)
        >>> best.filled == f"a {best.text} b", best.probability >= second.probability
        (True, True)

        Raises:
            ConfigError: no blank or several, or a run of one direction.
            DataError: a run on ids, and a text that is not ids.
        """
        return fill_blank(self.model, self.tokenizer, text, top=top, tokens=tokens)

    def _script(self, direction: Literal["forward", "backward"]) -> PromptCodec:
        if direction == "backward" and not self.model.bidirectional:
            raise ConfigError("this run reads in one direction; backward takes two (model.bidirectional: true)")
        return PromptCodec(self.tokenizer, self.config.batching.mode == "stream", direction)

    def unknown_tokens(self, text: str) -> list[str]:
        """The words or characters of a text that the vocabulary does not know; in a stream a newline is an end token.

        >>> model.unknown_tokens("a zebra b")
        ['zebra']
        """
        unknown = self.tokenizer.unk_id
        text = normalise(text).replace("\n", " " if self.tokenizer.separator else "")
        if unknown is None or unknown not in self.tokenizer.encode(text):
            return []
        parts = text.split() if self.tokenizer.separator else list(text)
        return [part for part in parts if unknown in self.tokenizer.encode(part)]

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

        >>> sorted(model.evaluate(["valid.txt"]).tallies)
        ['backward', 'fill', 'forward']

        Raises:
            ConfigError: what does not go with how this run reads text.
            DataError: a fault of the text, or no text at all.
        """
        goes_on = self.config.batching.carries_state
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
            left_out = {"end_tokens": [self.tokenizer.eos_id]}
            if self.tokenizer.unk_id is not None:
                left_out["unknown_tokens"] = [self.tokenizer.unk_id]
            result = scoring.evaluate(self.model, batches, columns, store.counts, left_out)
            if cache is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1)
                result.adapted["cache"] = evaluate_with_cache(self.model, batches, cache)
            if dynamic is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1, steps=dynamic.steps)
                result.adapted["dynamic"] = evaluate_dynamically(self.model, batches, dynamic)
            return result

    def worst_lines(self, paths: Sequence[str] | None = None, count: int = 10) -> list[tuple[str, Score, str]]:
        """The lines that cost most nats a token, worst first: where each stands, its score, its text.

        Each line is read by itself, of the files that `evaluate` would read; blank ones are left out.

        >>> [place.partition(":")[0] for place, _, _ in model.worst_lines(["valid.txt"], 2)]
        ['valid.txt', 'valid.txt']

        Raises:
            ConfigError, DataError: as `evaluate`.
        """

        def lines() -> Iterator[tuple[str, Score, str]]:
            for block in self._source(paths).blocks():
                for text, found in zip(block.texts, self.score([block]), strict=True):
                    if text.strip():
                        yield f"{block.path}:{found.line}", found, text

        return heapq.nlargest(count, lines(), key=lambda line: line[1].nats_per_token)

    def read(self, path: str) -> Iterator[Block]:
        """The lines of a file, as this run reads its own, for `score` and `embed`; raises DataError with the place."""
        return self._source([path]).blocks()

    def _source(self, paths: Sequence[str] | None) -> Source:
        if paths:
            form = "ids" if self.tokenizer.kind == "ids" else self.config.data.format
            stream = self.config.batching.mode == "stream"
            return Source.of(paths, format=form, field=self.config.data.field, stream=stream)
        try:
            own = source_of(self.config, "test") or source_of(self.config, "valid")
        except DataError as error:
            seen = "the run's own file, seen from this directory; name a file to evaluate"
            raise DataError(f"{error} ({seen})") from None
        if own is None:
            raise ConfigError("the run names neither a test nor a validation set; name a file to evaluate")
        return own


def _blocks(texts: Iterable[str] | Iterable[Block]) -> Iterator[Block]:
    """Texts in blocks; blocks as they are."""
    lines: list[str] = []
    first = 1
    for text in texts:
        if isinstance(text, Block):
            yield text
            continue
        lines.append(normalise(text))
        if len(lines) == LINES_AT_ONCE:
            yield Block("texts", first, lines)
            first, lines = first + len(lines), []
    if lines:
        yield Block("texts", first, lines)


def load(
    run: str | Path | RunDirectory | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> TrainedModel:
    """Load a trained run: the directory named, else the newest under `runs/`.

    Args:
        device: auto, cpu or cuda.
        notify: called with a line on anything the user should know, such as a damaged checkpoint passed over.

    Raises:
        ConfigError: no run to be found, or no such device.
        ArtefactError: not a run, or one that is damaged.
    """
    found = run if isinstance(run, RunDirectory) else find_run(run)
    loaded = load_run(found, choose_device(device), notify)
    return TrainedModel(loaded.run.path, loaded.config, loaded.tokenizer, loaded.model, loaded.step)
