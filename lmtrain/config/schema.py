"""Every configuration key with its type, bounds, default and meaning; `configs/README.md` has them in a table."""

import codecs
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PathList = Annotated[list[str], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
MOST = 1 << 31  # the upper bound of all counts


def _known_encoding(name: str) -> str:
    try:
        codecs.getincrementaldecoder(name)
        "".encode(name)  # refuses codecs that are none of text, such as rot13 and hex
    except (LookupError, ValueError):
        raise ValueError("not an encoding that Python knows, such as utf-8, cp949, cp1252 or utf-16") from None
    return name


class Section(BaseModel):
    """Refuses unknown keys, and numbers that are a bool, a text, NaN or infinite."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    train: PathList
    """The training text: a path, a glob, a directory or a list of them. `.gz .bz2 .xz .zst` are unpacked."""
    valid: PathList | None = None
    """The validation text; null takes `valid_fraction` of the training text, or trains without validation."""
    test: PathList | None = None
    """The text that `lmtrain evaluate` reads if no file is named; null evaluates on the validation text."""
    valid_fraction: float | None = Field(None, gt=0, lt=1)
    """Fraction of the training sequences held out for validation, chosen by the hash of their content."""
    format: Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "fasta", "ids"] = "auto"
    """How texts lie in a file: plain text, JSON lines, a JSON array, a table with a header (csv, tsv; parquet with the
    extra), FASTA, or whole numbers (ids); auto decides by the file's suffix, then by its content."""
    field: str = "text"
    """The field of a record or column of a table that holds the text. Where none is named text, auto takes one named
    content, sentence, document or review, or the only one with text, and says so. Of a table without a header it is
    the number of the column, from 1 on."""
    separator: str = Field("line", min_length=1)
    """What ends a sequence in plain text: line, paragraph (a blank line), file, or a text of your own such as
    `<|endoftext|>` or `%%`. A record or a cell is a sequence as it is, with the line breaks in it."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] = "utf-8"
    """Encoding of the files, such as cp949 or cp1252; a UTF-16 or UTF-32 byte order mark goes before it."""
    empty: Literal["skip", "keep"] = "skip"
    """Whether an empty line or record is a sequence of its own (keep), which is learnt, scored and drawn."""
    cache_dir: str = ".lmtrain-cache"
    """Folder of the token stores, which are found again by the content of the text and the tokenizer."""


class TokenizerConfig(Section):
    kind: Literal["char", "byte", "word", "bpe", "unigram", "ids", "file"] = "word"
    """What a token is: a character, a byte, a word between white space, a subword piece (bpe, unigram), a whole number
    as it is written (ids), or what the tokenizer in `path` says (file)."""
    vocab_size: int = Field(30000, ge=1, le=1 << 24)
    """Largest size of the vocabulary with its special tokens; for kind ids the exact number of ids."""
    min_frequency: int = Field(2, ge=1, le=MOST)
    """Kinds char and word: tokens that occur less often become `<unk>`, so that `<unk>` is learnt."""
    split: Literal["whitespace", "words"] = "whitespace"
    """Kind word: tokens are what stands between white space, for text that is cut already (whitespace), or words and
    marks at Unicode's word boundaries, which are put together again without loss (words)."""
    lowercase: bool = False
    """Turn upper case into lower case, in texts and prompts alike; not for the kinds ids and file."""
    path: str | None = None
    """Kind file: a tokenizer.json of the Hugging Face `tokenizers` library."""
    pad_id: int = Field(0, ge=0)
    """Kind ids: the id that never occurs in a sequence and fills up short rows."""


class BatchingConfig(Section):
    mode: Literal["sentences", "stream"] = "sentences"
    """sentences reads each line as a sequence; stream reads one long text and carries its state from chunk to chunk."""
    batch_size: int = Field(32, ge=1, le=MOST)
    """Rows of a batch, over all processes; in a stream, columns into which the text is cut, read side by side."""
    max_tokens: int | None = Field(None, ge=2, le=MOST)
    """Most padded tokens in a batch, in place of `batch_size`; null uses `batch_size`."""
    max_length: int = Field(512, ge=1, le=MOST)
    """Longest row in tokens, without `<bos>` and `<eos>`; longer sequences are split, never dropped."""
    bucket_batches: int = Field(150, ge=1, le=MOST)
    """Rows are sorted by length within this many shuffled batches: more means less padding, and a less random order."""
    bptt: int = Field(70, ge=1, le=MOST)
    """Stream: tokens of each column in a chunk, the span of truncated back-propagation through time (BPTT)."""
    random_bptt: bool = False
    """Stream: draw the length of each chunk around `bptt` (AWD-LSTM), so that chunks end elsewhere in each epoch."""
    carry_state: bool = False
    """Sentences: read the lines in order, in `batch_size` columns, and carry the state from line to line."""

    @property
    def carries_state(self) -> bool:
        """Whether the state is carried from row to row."""
        return self.mode == "stream" or self.carry_state


class ModelConfig(Section):
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """The recurrent cell: LSTM, GRU, or the plain (Elman) RNN, whose gradient fades with distance."""
    embedding_size: int = Field(256, ge=1, le=1 << 16)
    """Size of a token's embedding."""
    hidden_size: int = Field(512, ge=1, le=1 << 16)
    """Size of each layer's hidden state, in each direction."""
    num_layers: int = Field(2, ge=1, le=64)
    """Number of recurrent layers, in each direction."""
    layer_sizes: list[Annotated[int, Field(ge=1, le=1 << 16)]] | None = Field(None, min_length=1, max_length=64)
    """Hidden size of each layer, from the input up, in place of `hidden_size` and `num_layers`; null uses those."""
    bidirectional: bool = False
    """A second stack reads from right to left and predicts the previous token; both together fill blanks."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Fraction of values zeroed in training: of the embedding, between layers and before the output; 0: none."""
    residual: bool = False
    """Add each layer's input to its output (residual connections) where both have the same size."""
    layer_norm: bool = False
    """Normalise each layer's output (layer normalisation)."""
    ngram_embeddings: list[Annotated[int, Field(ge=2, le=16)]] = Field([], max_length=15)
    """Orders of n-grams, such as [2, 3, 4], whose embeddings go to the output layer directly, around the recurrence."""
    ngram_embedding_buckets: int = Field(16384, ge=1, le=1 << 24)
    """Number of vectors for the n-grams of each order, which are hashed to them."""
    ngram_counts: int | None = Field(None, ge=3, le=8)
    """Count the training text's n-grams up to this order, say 5, and mix them with the network; null counts none."""
    recent_tokens: int | None = Field(None, ge=8, le=4096)
    """Mix in the last tokens read, say 500, as a cache: what was read comes again; null: no cache."""
    tie_weights: bool = True
    """Weight tying: embedding and output layer share one matrix; a projection bridges sizes that differ."""
    output: Literal["full", "adaptive"] = "full"
    """full has one logit a token; adaptive is adaptive softmax for large vocabularies (with `tie_weights: false`)."""
    backend: Literal["auto", "packed", "torch"] = "auto"
    """What computes the recurrence: lmtrain's packed kernels or torch.nn (oneDNN, cuDNN); auto: the faster one here."""

    @property
    def largest_layer(self) -> int:
        """The hidden size of the largest layer."""
        return max(self.layer_sizes or [self.hidden_size])


class RegularizationConfig(Section):
    input_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked (variational) dropout on the embedding: fraction of features zeroed, the same for a whole row or chunk."""
    layer_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked (variational) dropout between layers: fraction of features zeroed."""
    output_dropout: float = Field(0.0, ge=0, lt=1)
    """Locked (variational) dropout before the output layer: fraction of features zeroed."""
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of the vocabulary whose embeddings are zeroed for a batch (embedding dropout of the AWD-LSTM)."""
    weight_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of the recurrent weights zeroed for a batch (DropConnect, the AWD-LSTM's weight drop)."""
    ngram_embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of the n-gram embeddings that are left out, drawn for each order and token by itself."""
    activation_penalty: float = Field(0.0, ge=0)
    """Activation regularisation (AR): nats per mean square of the last layer's outputs; 0 turns it off."""
    temporal_penalty: float = Field(0.0, ge=0)
    """Temporal activation regularisation (TAR): nats per mean square of the outputs' change from step to step."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing: fraction of each target that is spread over the vocabulary; reported nats are without it."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW; Muon for recurrence and projection matrices, with AdamW for the rest; or stochastic gradient descent."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, reached after `schedule.warmup_steps`."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW: decay rates of the averages of the gradient and of its square; short runs may want 0.99 for the second."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; biases and n-gram embeddings do not decay."""
    muon_lr_scale: float = Field(2.5, gt=0)
    """Learning rate of the matrices that Muon moves, as a multiple of `lr`."""
    ngram_lr_scale: float = Field(1.0, gt=0)
    """Learning rate of n-gram embeddings, as a multiple of `lr`; a lower one gives rare n-grams less weight."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Gradient clipping: largest global L2 norm of the gradient; null turns clipping off."""


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant", "plateau", "one_cycle"] = "cosine"
    """The learning rate after warm-up falls (cosine, linear), stays (constant), is cut when validation stalls
    (plateau), or rises and falls (one_cycle)."""
    warmup_steps: int = Field(100, ge=0, le=MOST)
    """Optimizer steps in which the learning rate rises linearly from 0."""
    final_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of the peak learning rate at the end; plateau does not cut below it; constant ignores it."""
    hold_fraction: float = Field(0.0, ge=0, lt=1)
    """cosine, linear: fraction of the training at the peak rate before it falls (warmup-stable-decay, WSD)."""
    patience: int = Field(1, ge=1, le=MOST)
    """plateau: validations without a better loss before the rate is cut and the best weights are restored."""
    factor: float = Field(0.25, gt=0, lt=1)
    """plateau: a cut multiplies the learning rate by this."""
    rise_fraction: float = Field(0.3, gt=0, lt=1)
    """one_cycle: fraction of the training in which the rate rises, from a 25th of its peak (PyTorch: `pct_start`)."""


class AveragingConfig(Section):
    name: Literal["ema", "triggered"] | None = None
    """Average of the weights over steps, validated and saved as the model: exponential moving average (ema), or of all
    steps since validation stalled (triggered: non-monotonically triggered averaged SGD, NT-ASGD)."""
    decay: float = Field(0.999, gt=0, lt=1)
    """ema: fraction of the average that each step keeps."""
    trigger: int = Field(5, ge=1, le=MOST)
    """triggered: begin when a validation is worse than the best of those more than this many validations ago."""


class LossWeightsConfig(Section):
    forward: float = Field(1.0, ge=0)
    """Weight of predicting the next token."""
    backward: float = Field(1.0, ge=0)
    """Weight of predicting the previous token (two directions)."""
    fill: float = Field(1.0, ge=0)
    """Weight of predicting a token from both its sides (two directions)."""


class TrainingConfig(Section):
    max_epochs: int = Field(10, ge=1, le=MOST)
    """Most passes over the training set."""
    max_steps: int | None = Field(None, ge=1, le=MOST)
    """Stop after this many optimizer steps, if the epochs last longer; null sets no limit."""
    max_minutes: float | None = Field(None, gt=0)
    """Time budget in minutes from the first step on; the schedule follows the fraction used up; null sets no limit."""
    sampled_tokens: int | None = Field(None, ge=1, le=MOST)
    """Sampled softmax: score the frequent tokens, the batch's own and about this many random ones; null scores all."""
    frequent_tokens: int = Field(4096, ge=0, le=MOST)
    """With sampled_tokens: how many of the most frequent tokens are scored at every step."""
    accumulate: int = Field(1, ge=1, le=MOST)
    """Gradient accumulation: batches whose gradients are summed into one optimizer step."""
    loss_weights: LossWeightsConfig = LossWeightsConfig()
    """Weight of each objective in the loss; the last two need two directions."""
    patience: int | None = Field(None, ge=1, le=MOST)
    """Early stopping: validations without a better loss before training stops; null never stops early."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the training runs; auto takes CUDA if it is there, else Apple's GPU (mps) if it is faster, else the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto measures which is faster here. Weights and sums stay in fp32."""
    num_threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; null leaves the number to PyTorch, and several processes divide the cores among them."""


class ValidationConfig(Section):
    every_steps: int | None = Field(None, ge=1, le=MOST)
    """Optimizer steps between validations; null validates once an epoch."""
    columns: int = Field(8, ge=1, le=1 << 16)
    """Stream, carry_state: columns in which the validation text is read (quick); `lmtrain evaluate` reads it in one."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(500, ge=1, le=MOST)
    """Optimizer steps between checkpoints; null saves by minutes alone."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Minutes between checkpoints, whichever comes first; null saves by steps alone."""
    keep: int = Field(2, ge=1, le=MOST)
    """Newest checkpoints that are kept, beside the best one."""


class LoggingConfig(Section):
    every_steps: int = Field(20, ge=1, le=MOST)
    """Optimizer steps between rows of metrics.jsonl and points in TensorBoard."""
    sample_prompts: list[str] = [""]
    """Prompts that the model continues at each validation, always with the most probable token."""
    histograms: bool = False
    """Write histograms of the weights to TensorBoard at each validation."""


class GenerationConfig(Section):
    max_tokens: int = Field(200, ge=1, le=MOST)
    """Most tokens that are generated, if no end token comes before."""


class Config(Section):
    """A whole configuration, every key with its value."""

    name: str = Field(pattern=r"^[^./\x00-\x1f\x7f][^/\x00-\x1f\x7f]*$", max_length=200)
    """Run directory `runs_dir/name`; null takes the config file's stem. Where it is taken, -2, -3 ... is added.
    For Windows keep to letters, digits, - and _, and avoid the names of devices (con, aux, nul)."""
    runs_dir: str = "runs"
    """Folder in which run directories are made."""
    seed: int = Field(1, ge=0, le=(1 << 63) - 1)
    """Seed of every random choice: initial weights, order of the data, dropout."""
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
