"""A trained run for use from Python: `lmtrain.load(run)`."""

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lmtrain.config import Config
from lmtrain.data.batches.loader import evaluation_batches
from lmtrain.data.preparation import source_of, ways_to_read
from lmtrain.data.store.token_store import open_store
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block
from lmtrain.data.text.source import Source
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError, DataError
from lmtrain.inference import generation, scoring
from lmtrain.inference.adaptation import Cache, Dynamic, evaluate_dynamically, evaluate_with_cache
from lmtrain.inference.beam import beam_search
from lmtrain.inference.export.folder import export_model
from lmtrain.inference.filling import Filling, fill_blank
from lmtrain.inference.generation import Generation
from lmtrain.inference.options import Beams, Sampling, check_generation
from lmtrain.inference.prompts import PromptCodec, end_text_of
from lmtrain.inference.scoring import Evaluation, Score
from lmtrain.inference.vectors import embed, save_vectors
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Direction
from lmtrain.runs.directory import RunDirectory, find_run
from lmtrain.runs.loading import load_run
from lmtrain.system.device import choose_device
from lmtrain.system.files import scratch_directory

Texts = Iterable[str] | Iterable[Block]

LINES_AT_ONCE = 4096
COMPARED_TOKENS = 5000  # tokens on which an export in 8 bits is compared with the original


class TrainedModel:
    """The best model of a run, its tokenizer and its configuration.

    With a run on ids, each method that takes texts raises DataError for a text that is not ids.
    """

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

        A run that was trained on a stream has no end token: it writes `max_tokens` tokens, newlines among them.

        Args:
            sampling: how tokens are drawn at random; None takes the most probable one.
            beams: search for the most probable text instead.
            count: number of texts to each prompt, drawn one by one or the best of a search; they follow each other.
            stop: texts that end a completion; they are cut off with what follows them.
            backward: write what comes before the prompts.

        >>> [each.text for each in model.generate(["a", "b"], max_tokens=0)]
        ['a', 'b']
        >>> drawn = model.generate(["a"], sampling=lmtrain.Sampling(temperature=0.7, top_k=5, seed=1), count=3)
        >>> [each.prompt for each in drawn]
        ['a', 'a', 'a']

        Raises:
            ConfigError: the settings contradict each other or this run.
        """
        check_generation(sampling, beams, count, stop)
        codec = self._codec("backward" if backward else "forward")
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        if beams is not None:
            return beam_search(self.model, codec, prompts, max_tokens=limit, beams=beams, count=count)
        ends = list(map(normalise, stop))
        return generation.generate(
            self.model, codec, prompts, max_tokens=limit, sampling=sampling, count=count, stop=ends
        )

    def stream(
        self,
        prompt: str = "",
        max_tokens: int | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the completion of one prompt while it is written, in whole characters; arguments as `generate`.

        >>> "".join(model.stream("a")) == model.generate(["a"])[0].completion
        True
        """
        check_generation(sampling, None, 1, stop)
        limit = self.config.generation.max_tokens if max_tokens is None else max_tokens
        codec, ends = self._codec("forward"), list(map(normalise, stop))
        return generation.stream(self.model, codec, prompt, max_tokens=limit, sampling=sampling, stop=ends)

    def score(
        self, texts: Texts, direction: Literal[Direction, "both"] = "forward", each: bool = False
    ) -> Iterator[Score]:
        """Score the texts one after the other, in memory that does not grow with their number.

        Args:
            texts: lines, or blocks of lines as `read_plain_text` gives them.
            direction: both gives the mean of the two directions' log-probabilities.
            each: give the log-probability of every token, too; only with one direction.

        >>> [(each.line, each.tokens) for each in model.score(["a b", "c"])]  # end tokens included
        [(1, 3), (2, 2)]

        Raises:
            ConfigError: the run does not have the direction, or `each` is asked of both.
        """
        if direction == "both" and each:
            raise ConfigError("direction both: a token's log-probability is that of one direction; name one")
        codec = self._codec("forward" if direction == "forward" else "backward")
        length = self.config.batching.max_length
        return scoring.score(self.model, codec, _blocks(texts), direction=direction, each=each, max_length=length)

    def embed(self, texts: Texts, path: str | Path) -> int:
        """Write the vectors of each text to an .npz file that `numpy.load` reads; returns the number of texts.

        The file holds `ids` (T,), `lengths` (texts,), `output` (T, D*H) and `h_n` (texts, num_layers*D, H), for T
        tokens of all texts, D directions and hidden size H: see `lmtrain.inference.vectors.Vectors`.

        >>> model.embed(["a b", "c"], "vectors.npz")
        2
        >>> numpy.load("vectors.npz")["output"].shape  # three tokens, two directions of 8
        (3, 16)

        Raises:
            ConfigError: the file already exists, or the run's layers differ in size.
        """
        return save_vectors(path, embed(self.model, self._codec("forward"), _blocks(texts)))

    def export(
        self, path: str | Path, format: Literal["onnx", "safetensors"] = "onnx", int8: bool = False
    ) -> list[str]:
        """Write the model and tokenizer.json into a new folder, for other programs; returns lines on what was written.

        Args:
            format: onnx writes model.onnx, one step of the forward direction (`onnx_model` lists inputs and outputs);
                safetensors writes model.safetensors, weights by the names of torch.nn (see `torch_weights`).
            int8: only with onnx: weights in 8 bits; the change of size, speed and perplexity is measured.

        >>> model.export("weights", "safetensors")
        ['weights/model.safetensors: 24 tensors']

        Raises:
            ConfigError: the folder already exists, a package is missing, or the model has no such form.
            StorageError: the folder can not be written.
        """
        return export_model(self.model, self.tokenizer, Path(path), format, int8, self._first_rows(COMPARED_TOKENS))

    def _first_rows(self, tokens: int) -> Iterator[list[int]]:
        """Yield the first rows of the text that `evaluate` reads, with start and end tokens; a stream is one row."""
        codec = self._codec("forward")
        row, stream = [codec.start], codec.stream
        try:
            for block in self._source(None).blocks():
                for text in block.texts if stream else filter(str.strip, block.texts):
                    ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
                    row, tokens = [*row, *ids], tokens - len(ids)
                    if not stream or tokens <= 0:
                        yield row
                        row = row[:1]
                    if tokens <= 0:
                        return
        except (ConfigError, DataError):
            return  # the run was copied elsewhere, without its text
        if len(row) > 1:
            yield row

    def fill(self, text: str, top: int = 5, tokens: int = 1) -> list[Filling]:
        """Find the `top` best fillings of the blank `____`, of up to `tokens` tokens, best first; see `fill_blank`.

        >>> best, second = model.fill("a ____ b", top=2)
        >>> best.filled == f"a {best.text} b", best.probability >= second.probability
        (True, True)

        Raises:
            ConfigError: the text holds no blank or several, or the run has one direction.
        """
        return fill_blank(self.model, self.tokenizer, text, top=top, tokens=tokens)

    def _codec(self, direction: Direction) -> PromptCodec:
        if direction == "backward" and not self.model.bidirectional:
            raise ConfigError("this run reads in one direction; backward takes two (model.bidirectional: true)")
        end_text = end_text_of(self.config.data.separator)
        return PromptCodec(self.tokenizer, self.config.batching.mode == "stream", direction, end_text)

    def unknown_tokens(self, text: str) -> list[str]:
        """List a text's words or characters that the vocabulary lacks, but no newline, which may be an end token.

        >>> model.unknown_tokens("a zebra b")
        ['zebra']
        """
        return list(self.tokenizer.unknown_parts(normalise(text).split("\n")))

    def evaluate(
        self,
        paths: Sequence[str] | None = None,
        batch_size: int | None = None,
        cache: Cache | None = None,
        dynamic: Dynamic | None = None,
    ) -> Evaluation:
        """Compute the perplexity on the named files, else on the run's test set, else on its validation set.

        A run that carries its state from row to row (batching.mode: stream, or carry_state) reads the text as one row.
        Only such a run takes `cache` and `dynamic`, and gives `Evaluation.adapted`; only another one takes `batch_size`
        (rows per batch, on which the figures do not depend).

        >>> sorted(model.evaluate(["valid.txt"]).tallies)
        ['backward', 'fill', 'forward']

        Raises:
            ConfigError: the arguments contradict how this run reads text.
            DataError: the text has a fault, or is missing.
        """
        carries_state = self.config.batching.carries_state
        if carries_state and batch_size is not None:
            raise ConfigError("batch_size: this run carries its state from row to row, and reads one row at a time")
        if not carries_state and (cache is not None or dynamic is not None):
            raise ConfigError(
                "cache and dynamic evaluation need a state that is carried from line to line, and this run starts each "
                "line anew; train with batching.mode: stream, or batching.carry_state: true"
            )
        with scratch_directory(self._scratch_parent()) as scratch:
            store = open_store(self._source(paths), self.tokenizer, scratch)
            batches, columns = evaluation_batches(self.config, store, self.tokenizer, 1, batch_size)
            left_out = {"end_tokens": [self.tokenizer.eos_id]}
            if self.tokenizer.unk_id is not None:
                left_out["unknown_tokens"] = [self.tokenizer.unk_id]
            counts = store.counts
            if self.tokenizer.kind == "ids":  # digits are no text: there are no bits per character
                counts = replace(counts, characters=0, bytes=0)
            result = scoring.evaluate(self.model, batches, columns, counts, left_out)
            if cache is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1)
                result.adapted["cache"] = evaluate_with_cache(self.model, batches, cache)
            if dynamic is not None:
                batches, _ = evaluation_batches(self.config, store, self.tokenizer, 1, steps=dynamic.steps)
                result.adapted["dynamic"] = evaluate_dynamically(self.model, batches, dynamic)
            return result

    def _scratch_parent(self) -> Path | None:
        """Return the directory in which to make a temporary token store: where the run's own stores are, if they are
        here, or else `/var/tmp`, which is for large files. None leaves it to the system, which often chooses memory."""
        cache = Path(self.config.data.cache_dir)
        folders = [cache] if any(cache.glob("*/store.json")) else []  # a run from elsewhere may name any directory
        folders += [] if "TMPDIR" in os.environ else [Path("/var/tmp")]
        return next((folder for folder in folders if os.access(folder, os.W_OK)), None)

    def worst_lines(self, paths: Sequence[str] | None = None, count: int = 10) -> list[tuple[str, Score, str]]:
        """Find the `count` lines with the most nats per token, worst first: place of each, its score, its text.

        Lines come from the files that `evaluate` would read; each is scored by itself, and blank ones are left out.

        >>> [place.partition(":")[0] for place, _, _ in model.worst_lines(["valid.txt"], 2)]
        ['valid.txt', 'valid.txt']
        """

        def lines() -> Iterator[tuple[str, Score, str]]:
            for block in self._source(paths).blocks():
                for text, score in zip(block.texts, self.score([block]), strict=True):
                    if text.strip() or self.config.data.empty == "keep":
                        yield f"{block.path}:{score.line}", score, text

        return heapq.nlargest(count, lines(), key=lambda line: line[1].nats_per_token)

    def read(self, path: str) -> Iterator[Block]:
        """Read the texts of a file as the run reads its own, for `score` and `embed`; a DataError names the place.

        Blank ones are among them, so that each text has a result.
        """
        source = self._source([path])
        return map(source.parse, source.raws())

    def _source(self, paths: Sequence[str] | None) -> Source:
        if paths:
            return Source.of(paths, **ways_to_read(self.config), may_be_one=True)
        try:
            source = source_of(self.config, "test") or source_of(self.config, "valid")
        except DataError as error:
            raise DataError(f"{error} (the run's own file, sought from this directory; name another)") from None
        if source is None:
            raise ConfigError("the run names neither a test nor a validation set; name a file to evaluate")
        return source


def _blocks(texts: Texts) -> Iterator[Block]:
    """Gather texts in blocks; blocks are passed on."""
    lines: list[str] = []
    first = 1
    for text in texts:
        if isinstance(text, Block):
            yield text
            continue
        lines.append(normalise(text))
        if len(lines) == LINES_AT_ONCE:
            yield Block("texts", range(first, first + len(lines)), lines)
            first, lines = first + len(lines), []
    if lines:
        yield Block("texts", range(first, first + len(lines)), lines)


def load(
    run: str | Path | RunDirectory | None = None, device: str = "auto", notify: Callable[[str], None] = lambda _: None
) -> TrainedModel:
    """Load the best model of a run.

    Args:
        run: a run directory, as `train` writes it; left out, the newest under `runs/`.
        device: cpu, cuda or mps (Apple's GPU); auto takes CUDA if PyTorch finds it, else the CPU.
        notify: is called with a line on anything the user should know, such as a damaged checkpoint that is skipped.

    Raises:
        ConfigError: no run is found, or no such device.
        ArtefactError: the directory is not a run, or it is damaged.
    """
    directory = run if isinstance(run, RunDirectory) else find_run(run)
    return TrainedModel(directory.path, *load_run(directory, choose_device(device), notify))
