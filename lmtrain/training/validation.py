"""Validation of a model in training: its figures and its samples."""

import math
from collections.abc import Sequence
from itertools import takewhile

from lmtrain.config import Config
from lmtrain.data.batches.loader import RankShard, evaluation_batches
from lmtrain.data.preparation import Corpora
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec, end_text_of
from lmtrain.inference.scoring import Evaluation, evaluate
from lmtrain.metrics import Tally
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.device import autocast
from lmtrain.system.processes import SingleProcess
from lmtrain.training.figures import LossWeights, validation_figures


class Validation:
    """The validation set and the sample prompts of a run."""

    def __init__(
        self, config: Config, corpora: Corpora, model: LanguageModel, weights: LossWeights, processes: SingleProcess
    ) -> None:
        self.config, self.corpora, self.model, self.weights = config, corpora, model, weights
        self.processes = processes

    def run(self, stopped_by: Sequence[int], precision: str) -> tuple[dict[str, float], list[dict[str, str]]] | None:
        """Return a row of validation metrics over the whole validation set, and the model's samples.

        The model is in evaluation mode, and nothing of it changes. Each process reads its part of the set, and the sums
        are exchanged; rank 0 writes the samples.

        Args:
            stopped_by: receives the numbers of signals while this runs; one is enough to end it early.
            precision: precision of the matrix products, `fp32` or `bf16`.

        Returns:
            The metrics by tag, empty if there is no validation set, and the samples, empty except in rank 0; None in
            every process if a signal to one of them ended the validation early.
        """
        samples = [] if self.processes.rank else self._samples(stopped_by)
        with autocast(precision, self.model.embedding.weight.device):
            result = self._evaluation(stopped_by)
        own = [value for tally in result.tallies.values() for value in (tally.nats, tally.tokens, tally.correct)]
        ended_early, *sums = map(math.fsum, zip(*self.processes.gather([bool(stopped_by), *own]), strict=True))
        if ended_early:
            return None
        if not result.tallies:
            return {}, samples
        values = iter(sums)
        result.tallies = {name: Tally(next(values), int(next(values)), int(next(values))) for name in result.tallies}
        return validation_figures(result, self.weights), samples

    def _evaluation(self, stopped_by: Sequence[int]) -> Evaluation:
        """Return the sums over this process's part of the validation set; no sums if there is no set."""
        if self.corpora.valid is None:
            return Evaluation({})
        columns, shard = self.config.validation.columns, RankShard(self.processes.rank, self.processes.world_size)
        store, tokenizer = self.corpora.valid, self.corpora.tokenizer
        batches, carried = evaluation_batches(self.config, store, tokenizer, columns, shard=shard)
        return evaluate(self.model, takewhile(lambda _: not stopped_by, batches), carried)

    def _samples(self, stopped_by: Sequence[int]) -> list[dict[str, str]]:
        """Return the model's greedy continuations of the sample prompts."""
        prompts = self.config.logging.sample_prompts
        if not prompts:
            return []
        end_text = end_text_of(self.config.data.separator)
        codec = PromptCodec(self.corpora.tokenizer, self.config.batching.mode == "stream", end_text=end_text)
        most = self.config.generation.max_tokens
        written = generate(self.model, codec, prompts, max_tokens=most, stopped=lambda: bool(stopped_by))
        return [{"prompt": each.prompt, "text": each.text} for each in written]


def stalled(losses: list[float], trigger: int) -> bool:
    """Tell whether the last validation loss is worse than the best of those more than `trigger` validations ago.

    The non-monotonic trigger of Merity et al. 2018, https://arxiv.org/abs/1708.02182.
    """
    earlier = losses[: -trigger - 1] if len(losses) > trigger + 1 else []
    return bool(earlier) and losses[-1] > min(earlier)
