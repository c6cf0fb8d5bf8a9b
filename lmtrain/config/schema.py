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
    jsonl_field: str = "text"
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
    """A line is a sequence (sentences), or all is one long text (stream: not built yet)."""
    batch_size: int = Field(32, ge=1, le=MOST)
    """Rows a step."""
    max_tokens: int | None = Field(None, ge=2, le=MOST)
    """Instead of batch_size: the most padded tokens a batch may hold."""
    max_length: int = Field(512, ge=1, le=MOST)
    """Longest row in tokens, `<bos>` and `<eos>` aside; longer sequences are split, never dropped."""
    bucket_batches: int = Field(150, ge=1, le=MOST)
    """Rows are sorted by length within this many shuffled batches: more means less padding, less chance."""
    bptt: int = Field(70, ge=1, le=MOST)
    """Stream: tokens per truncated back-propagation."""


class ModelConfig(Section):
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    """The recurrent cell; rnn is the plain one, whose gradient fades with distance."""
    embedding_size: int = Field(256, ge=1, le=1 << 16)
    """Size of a token's vector."""
    hidden_size: int = Field(512, ge=1, le=1 << 16)
    """Size of a layer's state, in each direction."""
    num_layers: int = Field(2, ge=1, le=64)
    """Recurrent layers, in each direction."""
    bidirectional: bool = False
    """A second stack reads from the right and predicts the previous token; together they fill blanks."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of values zeroed in training: on the embedding, between layers and before the output."""
    tie_weights: bool = True
    """Embedding and output layer share their weights; a projection bridges sizes that differ."""
    output: Literal["full", "adaptive"] = "full"
    """One logit a token, or adaptive softmax for a large vocabulary (then with `tie_weights: false`)."""
    backend: Literal["auto", "packed", "torch"] = "auto"
    """What runs the recurrence: lmtrain's packed kernels or torch.nn's (oneDNN, cuDNN); auto: the faster one here."""


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain stochastic gradient descent."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, reached after `schedule.warmup_steps`."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """adamw: decay rates of the averages of the gradient and of its square; a short run may want the second at 0.99."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of matrices; biases are left alone."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient; null turns clipping off."""


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = Field(100, ge=0, le=MOST)
    """Steps in which the learning rate rises linearly from 0."""
    final_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the peak learning rate at the end; constant ignores it."""


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
    """CPU threads; null leaves it to PyTorch."""


class ValidationConfig(Section):
    every_steps: int | None = Field(None, ge=1, le=MOST)
    """Optimizer steps between validations; null validates once an epoch."""


class CheckpointConfig(Section):
    every_steps: int | None = Field(500, ge=1, le=MOST)
    """Optimizer steps between saves."""
    every_minutes: float | None = Field(10, gt=0)
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
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    generation: GenerationConfig = GenerationConfig()
