"""Keys that are right by themselves and wrong together."""

from __future__ import annotations

from collections.abc import Iterator

from lmtrain.config.schema import Config

Fault = tuple[tuple[str, ...], str]


def contradictions(config: Config) -> Iterator[Fault]:
    """The path of a key, and why its value can't stand beside the others."""
    yield from _of_data(config)
    yield from _of_carried_state(config)
    yield from _of_model(config)
    yield from _of_training(config)


def _validates(config: Config) -> bool:
    return config.data.valid is not None or config.data.valid_fraction is not None


def _of_data(config: Config) -> Iterator[Fault]:
    if config.data.valid is not None and config.data.valid_fraction is not None:
        yield (
            ("data", "valid_fraction"),
            "data.valid names the validation set already; set one of the two to null",
        )
    if (config.tokenizer.kind == "file") != (config.tokenizer.path is not None):
        yield ("tokenizer", "path"), "goes with tokenizer.kind: file, and only with it"
    if config.tokenizer.kind == "ids":
        if config.data.format == "jsonl":
            yield ("data", "format"), "tokenizer.kind: ids reads lines of integers; use ids or auto"
        if config.tokenizer.pad_id >= config.tokenizer.vocab_size:
            yield (
                ("tokenizer", "pad_id"),
                f"should be below tokenizer.vocab_size ({config.tokenizer.vocab_size})",
            )
    elif config.data.format == "ids":
        yield ("data", "format"), "ids goes with tokenizer.kind: ids"
    if config.tokenizer.kind in ("bpe", "unigram") and config.tokenizer.vocab_size < 261:
        yield ("tokenizer", "vocab_size"), "should be 261 or more: 256 bytes and what stands beside them"


def _of_carried_state(config: Config) -> Iterator[Fault]:
    batching, stream = config.batching, config.batching.mode == "stream"
    if not batching.goes_on:
        if batching.random_bptt:
            yield ("batching", "random_bptt"), "goes with batching.mode: stream"
        return
    text = "a stream" if stream else "a text whose lines follow on"
    if stream and batching.carry_state:
        yield ("batching", "carry_state"), "a stream always carries its state; this is for batching.mode: sentences"
    if config.model.bidirectional:
        yield (
            ("model", "bidirectional"),
            f"{text} has no right end to read from; use batching.mode: sentences without carry_state",
        )
    if config.data.valid_fraction is not None:
        yield ("data", "valid_fraction"), f"held-out lines would tear {text} apart; name a file in data.valid"
    if batching.max_tokens is not None:
        yield ("batching", "max_tokens"), f"{text} is read in batch_size columns; set max_tokens: null"


def _of_model(config: Config) -> Iterator[Fault]:
    if config.model.output == "adaptive" and config.model.tie_weights:
        yield ("model", "output"), "adaptive has output weights of its own; set model.tie_weights: false"
    if config.training.sampled_tokens is not None:
        if config.model.output == "adaptive":
            yield ("training", "sampled_tokens"), "samples a full output layer; adaptive scores a part of it by itself"
        if config.regularization.label_smoothing:
            yield ("regularization", "label_smoothing"), "would spread targets over the sampled part alone; use one"
    if len(set(config.model.ngram_embeddings)) < len(config.model.ngram_embeddings):
        yield ("model", "ngram_embeddings"), "names an order twice"
    if config.model.ngram_counts is not None and config.batching.carry_state:
        yield ("model", "ngram_counts"), "counts lines by themselves; use batching.mode: stream for a text that goes on"
    if config.model.output == "adaptive" and config.regularization.label_smoothing:
        yield (
            ("regularization", "label_smoothing"),
            "spreads targets over a full output layer; set model.output: full",
        )


def _of_training(config: Config) -> Iterator[Fault]:
    training, schedule = config.training, config.schedule
    weights = training.loss_weights
    if not weights.forward and not (config.model.bidirectional and (weights.backward or weights.fill)):
        yield ("training", "loss_weights"), "all are zero: there is nothing to learn"
    if training.patience is not None and not _validates(config):
        yield ("training", "patience"), "needs a validation set: set data.valid or data.valid_fraction"
    if config.averaging.name == "triggered":
        if not _validates(config):
            yield ("averaging", "name"), "triggered waits for validations: set data.valid or data.valid_fraction"
        if schedule.name == "plateau":
            yield ("averaging", "name"), "triggered goes on where plateau goes back to earlier weights; use one of them"
        if training.patience is not None and training.patience <= config.averaging.trigger:
            yield (
                ("averaging", "trigger"),
                f"training.patience ({training.patience}) ends the run before averaging could begin",
            )
    if schedule.name != "plateau":
        return
    every, most = config.validation.every_steps, training.max_steps
    if not _validates(config):
        yield ("schedule", "name"), "plateau waits for validations: set data.valid or data.valid_fraction"
    elif training.patience is not None and training.patience <= schedule.patience:
        yield (
            ("schedule", "patience"),
            f"training.patience ({training.patience}) ends the run before the learning rate could be cut",
        )
    elif every is not None and most is not None and most // every <= schedule.patience:
        yield ("schedule", "patience"), f"never fires: training.max_steps ({most}) leaves {most // every} validations"
    elif every is None and training.max_minutes is not None:
        yield (
            ("schedule", "name"),
            "plateau may never fire: a time budget (training.max_minutes) can end before an epoch's validation; "
            "set validation.every_steps",
        )
