"""Finds keys whose values are right by themselves and wrong together."""

from collections.abc import Iterator

from lmtrain.config.schema import Config


def contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of each key whose value contradicts other values, and the reason."""
    for check in (_data, _carried_state, _model, _training, _plateau):
        for key, reason in check(config):
            yield tuple(key.split(".")), reason


def _validates(config: Config) -> bool:
    return config.data.valid is not None or config.data.valid_fraction is not None


def _data(config: Config) -> Iterator[tuple[str, str]]:
    data, tokenizer = config.data, config.tokenizer
    if data.valid is not None and data.valid_fraction is not None:
        yield "data.valid_fraction", "data.valid names the validation set already; set one of the two to null"
    if (tokenizer.kind == "file") != (tokenizer.path is not None):
        yield "tokenizer.path", "goes with tokenizer.kind: file, and only with it"
    if tokenizer.split == "words" and tokenizer.kind != "word":
        yield "tokenizer.split", f"words goes with tokenizer.kind: word, not with {tokenizer.kind}"
    if tokenizer.lowercase and tokenizer.kind in ("ids", "file"):
        yield "tokenizer.lowercase", f"goes with text that lmtrain cuts into tokens, not with kind {tokenizer.kind}"
    if tokenizer.kind == "ids":
        if data.format not in ("auto", "text", "ids"):
            yield "data.format", "tokenizer.kind: ids reads lines of integers; use ids or auto"
        if tokenizer.pad_id >= tokenizer.vocab_size:
            yield "tokenizer.pad_id", f"should be below tokenizer.vocab_size ({tokenizer.vocab_size})"
    elif data.format == "ids":
        yield "data.format", "ids goes with tokenizer.kind: ids"
    if data.separator != "line" and data.format not in ("auto", "text", "ids"):
        yield "data.separator", f"goes with plain text; a file of the format {data.format} has a text in each record"
    if tokenizer.kind in ("bpe", "unigram") and tokenizer.vocab_size < 261:
        yield "tokenizer.vocab_size", "should be 261 or more: 256 bytes, 4 special tokens and a piece"


def _carried_state(config: Config) -> Iterator[tuple[str, str]]:
    batching, stream = config.batching, config.batching.mode == "stream"
    if not batching.carries_state:
        if batching.random_bptt:
            yield "batching.random_bptt", "goes with batching.mode: stream"
        return
    text = "a stream" if stream else "a text whose lines follow each other"
    if stream and batching.carry_state:
        yield "batching.carry_state", "a stream always carries its state; this is for batching.mode: sentences"
    if config.model.bidirectional:
        yield "model.bidirectional", f"{text} has no right end; use batching.mode: sentences without carry_state"
    if config.data.valid_fraction is not None:
        yield "data.valid_fraction", f"held-out lines would tear {text} apart; name a file in data.valid"
    if batching.max_tokens is not None:
        yield "batching.max_tokens", f"{text} is read in batch_size columns; set max_tokens: null"


def _model(config: Config) -> Iterator[tuple[str, str]]:
    model, smoothing = config.model, config.regularization.label_smoothing
    if model.output == "adaptive" and model.tie_weights:
        yield "model.output", "adaptive has output weights of its own; set model.tie_weights: false"
    if config.training.sampled_tokens is not None:
        if model.output == "adaptive":
            yield "training.sampled_tokens", "samples a full output layer, and adaptive scores a part of it by itself"
        if smoothing:
            yield "regularization.label_smoothing", "would spread targets over sampled tokens alone; use one of the two"
    if len(set(model.ngram_embeddings)) < len(model.ngram_embeddings):
        yield "model.ngram_embeddings", "names an order twice"
    if model.ngram_counts is not None and config.batching.carry_state:
        yield "model.ngram_counts", "counts each line by itself; use batching.mode: stream to carry the state"
    if model.output == "adaptive" and smoothing:
        yield "regularization.label_smoothing", "spreads targets over a full output layer; set model.output: full"


def _training(config: Config) -> Iterator[tuple[str, str]]:
    training, averaging = config.training, config.averaging
    weights, patience = training.loss_weights, training.patience
    if not weights.forward and not (config.model.bidirectional and (weights.backward or weights.fill)):
        yield "training.loss_weights", "all are zero, so the model would learn nothing"
    if patience is not None and not _validates(config):
        yield "training.patience", "needs a validation set: set data.valid or data.valid_fraction"
    if averaging.name == "triggered":
        if not _validates(config):
            yield "averaging.name", "triggered waits for validations: set data.valid or data.valid_fraction"
        if config.schedule.name == "plateau":
            yield "averaging.name", "triggered keeps the weights, and plateau restores earlier ones; use one of them"
        if patience is not None and patience <= averaging.trigger:
            yield "averaging.trigger", f"training.patience ({patience}) ends the run before averaging could begin"


def _plateau(config: Config) -> Iterator[tuple[str, str]]:
    training, schedule = config.training, config.schedule
    every, most, patience = config.validation.every_steps, training.max_steps, training.patience
    if schedule.name != "plateau":
        return
    if not _validates(config):
        yield "schedule.name", "plateau waits for validations: set data.valid or data.valid_fraction"
    elif patience is not None and patience <= schedule.patience:
        yield "schedule.patience", f"training.patience ({patience}) ends the run before the learning rate could be cut"
    elif every is not None and most is not None and most // every <= schedule.patience:
        yield "schedule.patience", f"never fires: training.max_steps ({most}) leaves {most // every} validations"
    elif every is None and training.max_minutes is not None:
        yield "schedule.name", "plateau may never fire: training.max_minutes may end first; set validation.every_steps"
