"""Validation of a model in training: its figures and its samples."""

import math

from lmtrain.config import Config
from lmtrain.data.batches.loader import RankShard, evaluation_batches
from lmtrain.data.preparation import Corpora
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec
from lmtrain.inference.scoring import evaluate
from lmtrain.metrics import Tally
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.processes import SingleProcess
from lmtrain.training.figures import LossWeights, validation_figures


class Validation:
    """The validation set and the sample prompts of a run."""

    def __init__(
        self, config: Config, corpora: Corpora, model: LanguageModel, weights: LossWeights, processes: SingleProcess
    ) -> None:
        self.config, self.corpora, self.model, self.weights = config, corpora, model, weights
        self.processes = processes

    def figures(self) -> dict[str, float]:
        """Return a row of validation metrics over the whole validation set; empty if there is none.

        Each process reads its part of the set, and the sums are exchanged.
        """
        if self.corpora.valid is None:
            return {}
        columns, shard = self.config.validation.columns, RankShard(self.processes.rank, self.processes.world_size)
        store, tokenizer = self.corpora.valid, self.corpora.tokenizer
        batches, carried = evaluation_batches(self.config, store, tokenizer, columns, shard=shard)
        result = evaluate(self.model, batches, carried)
        own = [value for tally in result.tallies.values() for value in (tally.nats, tally.tokens, tally.correct)]
        sums = iter([math.fsum(values) for values in zip(*self.processes.gather(own), strict=True)])
        result.tallies = {name: Tally(next(sums), int(next(sums)), int(next(sums))) for name in result.tallies}
        return validation_figures(result, self.weights)

    def samples(self) -> list[dict[str, str]]:
        """Return the model's greedy continuations of the sample prompts."""
        prompts = self.config.logging.sample_prompts
        if not prompts:
            return []
        codec = PromptCodec(self.corpora.tokenizer, stream=self.config.batching.mode == "stream")
        written = generate(self.model, codec, prompts, max_tokens=self.config.generation.max_tokens)
        return [{"prompt": each.prompt, "text": each.text} for each in written]


def stalled(losses: list[float], trigger: int) -> bool:
    """Tell whether the last validation loss is worse than the best of those more than `trigger` validations ago.

    The non-monotonic trigger of Merity et al. 2018, https://arxiv.org/abs/1708.02182.
    """
    earlier = losses[: -trigger - 1] if len(losses) > trigger + 1 else []
    return bool(earlier) and losses[-1] > min(earlier)
