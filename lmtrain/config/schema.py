"""Every configuration key: its name, type, bounds, default and meaning, once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PathList = Annotated[list[str], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]


MOST = 1 << 31  # of anything that is counted


class Section(BaseModel):
    """Unknown keys are refused, numbers are strict (no bool as int, no text as number, no NaN)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    train: PathList
    """Training text: a path, a glob or a list of them; `.gz` is read as it is."""
    valid: PathList | None = None
    """Validation text; null takes `valid_fraction` of the training text, or goes without."""
    test: PathList | None = None
    """What `lmtrain evaluate` reads where no file is named."""
    valid_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training sequences held out for validation, chosen by the hash of their content."""
    format: Literal["auto", "text", "jsonl", "ids"] = "auto"
    """A line is a sequence (text, ids) or a record with a text field (jsonl); auto goes by the suffix."""
    field: str = "text"
    """The field of a jsonl record that holds its text."""
    cache_dir: str = ".lmtrain-cache"
    """Where token stores are kept, keyed by content and tokenizer."""


class TokenizerConfig(Section):
    kind: Literal["char", "byte", "word", "bpe", "unigram", "ids", "file"] = "word"
    """What a token is: a character, a byte, a word, a subword piece, an id as written, or what a file says."""
    vocab_size: int = Field(30000, ge=1, le=1 << 24)
    """Upper bound of the vocabulary, special tokens counted; for kind ids the exact number of ids."""
    min_frequency: int = Field(2, ge=1, le=MOST)
    """Kinds char and word: rarer tokens become `<unk>`, so that `<unk>` is learnt."""
    path: str | None = None
    """Kind file: a tokenizer.json of the Hugging Face `tokenizers` library."""
    pad_id: int = Field(0, ge=0)
    """Kind ids: the id that never occurs in a sequence."""


class BatchingConfig(Section):
    mode: Literal["sentences", "stream"] = "sentences"
    """A line is a sequence (sentences), or all is one long text, its state carried from chunk to chunk (stream)."""
    batch_size: int = Field(32, ge=1, le=MOST)
    """Rows a step; stream: columns into which the text is cut, read side by side."""
    max_tokens: int | None = Field(None, ge=2, le=MOST)
    """Instead of batch_size: the most padded tokens a batch may hold."""
    max_length: int = Field(512, ge=1, le=MOST)
    """Longest row in tokens, `<bos>` and `<eos>` aside; longer sequences are split, never dropped."""
    bucket_batches: int = Field(150, ge=1, le=MOST)
    """Rows are sorted by length within this many shuffled batches: more means less padding, less chance."""
    bptt: int = Field(70, ge=1, le=MOST)
    """Stream: tokens of each column per truncated back-propagation."""
    random_bptt: bool = False
    """Stream: draw the length of each chunk around bptt, so that its borders lie elsewhere in each epoch."""
    carry_state: bool = False
    """Sentences: lines follow on: read in order, in batch_size columns, the state carried from line to line."""

    @property
    def goes_on(self) -> bool:
        """Whether the state is carried from row to row."""
        return self.mode == "stream" or self.carry_state


class ModelConfig(Section):
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """The recurrent cell; rnn is the plain one, whose gradient fades with distance."""
    embedding_size: int = Field(256, ge=1, le=1 << 16)
    """Size of a token's vector."""
    hidden_size: int = Field(512, ge=1, le=1 << 16)
    """Size of a layer's state, in each direction."""
    num_layers: int = Field(2, ge=1, le=64)
    """Recurrent layers, in each direction."""
    layer_sizes: list[Annotated[int, Field(ge=1, le=1 << 16)]] | None = Field(None, min_length=1, max_length=64)
    """Size of each layer's state, from the input up, in place of hidden_size and num_layers."""
    bidirectional: bool = False
    """A second stack reads from the right and predicts the previous token; together they fill blanks."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of values zeroed in training: on the embedding, between layers and before the output."""
    residual: bool = False
    """Add a layer's input to its output, where the two are of one size."""
    layer_norm: bool = False
    """Normalise each layer's output."""
    ngram_embeddings: list[Annotated[int, Field(ge=2, le=16)]] = Field([], max_length=15)
    """Orders of n-grams that are connected to the output layer directly, around the recurrence: [2, 3, 4, 5]."""
    ngram_embedding_buckets: int = Field(16384, ge=1, le=1 << 24)
    """Vectors for the n-grams of each order; n-grams are hashed to them."""
    ngram_counts: int | None = Field(None, ge=3, le=8)
    """Count n-grams of up to so many tokens in the training text and mix them with the network: 5; null: don't."""
    tie_weights: bool = True
    """Embedding and output layer share their weights; a projection bridges sizes that differ."""
    output: Literal["full", "adaptive"] = "full"
    """One logit a token, or adaptive softmax for a large vocabulary (then with `tie_weights: false`)."""
    backend: Literal["auto", "packed", "torch"] = "auto"
    """What runs the recurrence: lmtrain's packed kernels or torch.nn's (oneDNN, cuDNN); auto: the faster one here."""


class RegularizationConfig(Section):
    input_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked dropout on the embedding: share of features zeroed, the same at each step of a row (or chunk)."""
    layer_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked dropout between layers."""
    output_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked dropout before the output layer."""
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the vocabulary whose embeddings are zeroed for a batch (embedding dropout)."""
    weight_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the recurrent weights zeroed for a batch (weight drop, DropConnect)."""
    ngram_embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the vectors of n-grams that are left out, each order and token by itself."""
    activation_penalty: float = Field(0.0, ge=0)
    """Activation regularisation: nats per mean square of the last layer's outputs."""
    temporal_penalty: float = Field(0.0, ge=0)
    """Temporal activation regularisation: nats per mean square of their change from step to step."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread over the vocabulary in training; reported nats are without it."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW; Muon for the matrices of recurrence and projections, AdamW for all else; plain stochastic gradient
    descent."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, reached after `schedule.warmup_steps`."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW: decay rates of the averages of the gradient and of its square; a short run may want the second at 0.99."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of matrices; biases and the vectors of n-grams are left alone."""
    muon_lr_scale: float = Field(2.5, gt=0)
    """Learning rate of the matrices that Muon moves, in shares of lr."""
    ngram_lr_scale: float = Field(1.0, gt=0)
    """Learning rate of the vectors of n-grams, in shares of lr: the lower, the more often one must be seen to count."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient; null turns clipping off."""


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant", "plateau", "one_cycle"] = "cosine"
    """How the learning rate goes: falls after the warm-up, stays, is cut where validation stalls, rises and falls."""
    warmup_steps: int = Field(100, ge=0, le=MOST)
    """Steps in which the learning rate rises linearly from 0."""
    final_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the peak learning rate at the end; plateau: below which it is not cut; constant ignores it."""
    hold_fraction: float = Field(0.0, ge=0, lt=1)
    """cosine, linear: share of the training at the peak learning rate, before it falls."""
    patience: int = Field(1, ge=1, le=MOST)
    """plateau: validations without a better loss before the rate is cut and the best weights are taken up again."""
    factor: float = Field(0.25, gt=0, lt=1)
    """plateau: what a cut leaves of the learning rate."""
    rise_fraction: float = Field(0.3, gt=0, lt=1)
    """one_cycle: share of the training in which the learning rate rises, from a 25th of its peak."""


class AveragingConfig(Section):
    name: Literal["ema", "triggered"] | None = None
    """Average of the weights over steps, which is validated and saved as the model: exponential (ema), or of all steps
    since validation stalled (triggered: averaged SGD with the non-monotonic trigger)."""
    decay: float = Field(0.999, gt=0, lt=1)
    """ema: what each step keeps of the average."""
    trigger: int = Field(5, ge=1, le=MOST)
    """triggered: begin where a validation is worse than the best of those more than this many validations ago."""


class LossWeightsConfig(Section):
    forward: float = Field(1.0, ge=0)
    """Predicting the next token."""
    backward: float = Field(1.0, ge=0)
    """Predicting the previous token (two directions)."""
    fill: float = Field(1.0, ge=0)
    """Predicting a token from both its sides (two directions)."""


class TrainingConfig(Section):
    max_epochs: int = Field(10, ge=1, le=MOST)
    """Passes over the training set."""
    max_steps: int | None = Field(None, ge=1, le=MOST)
    """Stop after this many optimizer steps, if the epochs last longer."""
    max_minutes: float | None = Field(None, gt=0)
    """A time budget; the schedule then runs on the share of it that is used up."""
    sampled_tokens: int | None = Field(None, ge=1, le=MOST)
    """Score a part of the vocabulary at each step, about this many tokens drawn at random; null scores all of it."""
    frequent_tokens: int = Field(4096, ge=0, le=MOST)
    """sampled_tokens: how many of the most frequent tokens are always scored, beside the batch's own."""
    accumulate: int = Field(1, ge=1, le=MOST)
    """Batches whose gradients are summed into one optimizer step."""
    loss_weights: LossWeightsConfig = LossWeightsConfig()
    """What each objective counts in the loss; the last two with two directions only."""
    patience: int | None = Field(None, ge=1, le=MOST)
    """Validations without a better loss before training stops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products; auto measures which is faster here. Weights and sums stay fp32."""
    num_threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; null leaves it to PyTorch, and several processes share out the cores."""


class ValidationConfig(Section):
    every_steps: int | None = Field(None, ge=1, le=MOST)
    """Optimizer steps between validations; null validates once an epoch."""
    columns: int = Field(8, ge=1, le=1 << 16)
    """Stream and carry_state: columns in which the text is read (quick); `lmtrain evaluate` reads it in one."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(500, ge=1, le=MOST)
    """Optimizer steps between saves."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Minutes between saves, whichever comes first."""
    keep: int = Field(2, ge=1, le=MOST)
    """Newest checkpoints kept, beside the best one."""


class LoggingConfig(Section):
    every_steps: int = Field(20, ge=1, le=MOST)
    """Optimizer steps between rows in metrics.jsonl and TensorBoard."""
    sample_prompts: list[str] = [""]
    """At each validation the model goes on with these greedily."""
    histograms: bool = False
    """Histograms of weights in TensorBoard, at each validation."""


class GenerationConfig(Section):
    max_tokens: int = Field(200, ge=1, le=MOST)
    """Longest text generated, where no end token comes before."""


class Config(Section):
    """A whole configuration, every key with its value."""

    name: str = Field(pattern=r"^[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*$", max_length=200)
    """Run directory: `runs_dir/name`; null takes the file's stem; -2, -3 ... is added where it is taken."""
    runs_dir: str = "runs"
    """Where run directories are made."""
    seed: int = Field(1, ge=0, le=(1 << 63) - 1)
    """Start of every random choice: weights, order of the data, dropout."""
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    batching: BatchingConfig = BatchingConfig()
    model: ModelConfig = ModelConfig()
    regularization: RegularizationConfig = RegularizationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    generation: GenerationConfig = GenerationConfig()


RENAMED_KEYS = {  # the keys of lmtrain 0.1 and their names today
    "data.jsonl_field": "data.field",
    "model.counts": "model.ngram_counts",
    "model.ngrams": "model.ngram_embeddings",
    "model.ngram_buckets": "model.ngram_embedding_buckets",
    "regularization.word_dropout": "regularization.embedding_dropout",
    "regularization.ngram_dropout": "regularization.ngram_embedding_dropout",
    "optimizer.muon_rate": "optimizer.muon_lr_scale",
    "optimizer.ngram_rate": "optimizer.ngram_lr_scale",
}
