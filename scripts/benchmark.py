"""lmtrain against stock PyTorch: how many times as many tokens a second, row by row, on the machine this runs on.

    python scripts/benchmark.py [--row NAME]... [--quick] [--json] [--device cpu|cuda]

Stock PyTorch is written the plain way: `nn.LSTM` or `nn.GRU` (packed where rows are ragged), `nn.Linear`,
`nn.CrossEntropyLoss`, `torch.optim`, fp32 (with TF32 on CUDA). lmtrain runs what `lmtrain train` runs with its
default `precision: auto`. Both do whole training steps: loss, gradients, clipping, update; no dropout. Each side has
a process of its own; they take turns, A B A B, and a row's ratio is the median of its pairs. `--json` prints an object
a row, with the peak of each side's memory on the device. On CUDA all rows take about four minutes.

The limit of a training row is the machine's: the seconds of nothing but the matrix products of a step, each by the
fastest library that PyTorch has for its shape, in lmtrain's precision. `share` is the limit's seconds over lmtrain's.
A row should have a share of 0.75, and be 1.2 times as fast as stock where a share of 0.9 is enough for that: `at least`
is the ratio that both need on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lmtrain.config.schema import Config
from lmtrain.data.batches.loader import RankBatch, shuffled_rows
from lmtrain.data.batches.rows import Batch, make_batch
from lmtrain.data.tokenizers.ids import IdsTokenizer
from lmtrain.inference.generation import generate
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import align
from lmtrain.model.output import FullOutput
from lmtrain.system.device import autocast, choose_device, choose_precision, keep_freed_memory, make_deterministic
from lmtrain.system.variables import set_variables
from lmtrain.training.step import TrainingStep

BOS, EOS = 1, 2
BATCHES = 64  # of sentences; after the last the first comes again
SHARE, LARGE_SHARE, TIMES_STOCK = 0.75, 0.9, 1.2  # what a row should have of its limit, and over stock PyTorch
SELF = 0.87  # what a large batch or corpus should have of a small one's speed


@dataclass(frozen=True)
class Product:
    """A matrix product (rows, inner) @ (inner, outer) that a training step does `count` times."""

    count: float
    rows: int
    inner: int
    outer: int


@dataclass(frozen=True)
class Work:
    """What one side of a row does again and again."""

    run: Callable[[], object]
    tokens: int  # that one run trains on or writes
    products: Sequence[Product] = ()  # of one run
    precision: str = "fp32"
    model: nn.Module | None = None  # that one run trains


@dataclass(frozen=True)
class Shape:
    """A model and the batches it is trained on."""

    cell: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    batches: Callable[[int], list[Batch]]
    tied: bool = False
    bidirectional: bool = False
    optimizer: str = "adam"


def zipf(random: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    """Ids from 3 on, as unevenly spread as words are."""
    chances = 1 / np.arange(10, vocab_size + 7)
    return 3 + random.choice(vocab_size - 3, count, p=chances / chances.sum())


def sentences(vocab_size: int, rows: int = 32) -> list[Batch]:
    """Rows as long as sentences: normal(22, 9)."""
    random = np.random.default_rng(1)
    lengths = np.clip(random.normal(22, 9, (BATCHES, rows)).round(), 2, 60).astype(int)  # hardly two batches are alike
    return [make_batch([[BOS, *zipf(random, vocab_size, n), EOS] for n in each], 0) for each in lengths]


def columns(rows: int, length: int) -> Callable[[int], list[Batch]]:
    """Rows of one length, as a long text is cut for truncated back-propagation."""

    def batches(vocab_size: int) -> list[Batch]:
        random = np.random.default_rng(1)
        return [make_batch(zipf(random, vocab_size, rows * (length + 1)).reshape(rows, -1), 0) for _ in range(4)]

    return batches


# ---- stock PyTorch


class StockModel(nn.Module):
    """What one writes after reading PyTorch's tutorials; two directions as lmtrain defines them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, size)
        layers = {"lstm": nn.LSTM, "gru": nn.GRU}[shape.cell]
        self.stacks = nn.ModuleList(layers(size, size, shape.num_layers) for _ in range(1 + shape.bidirectional))
        self.output = nn.Linear(size, shape.vocab_size)
        if shape.tied:
            self.output.weight = self.embedding.weight
        if shape.bidirectional:
            self.join = nn.Sequential(nn.Linear(2 * size, size), nn.Tanh(), nn.Linear(size, size, bias=False))
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, batch: Batch) -> Tensor:
        if int(batch.lengths[0]) == int(batch.lengths[-1]):
            states, _ = self.stacks[0](self.embedding(batch.tokens[:-1]))
            return self.criterion(self.output(states.flatten(0, 1)), batch.tokens[1:].flatten())
        packed = pack_padded_sequence(self.embedding(batch.tokens[:-1]), batch.lengths - 1)
        forward = self.stacks[0](packed)[0].data
        targets = pack_padded_sequence(batch.tokens[1:], batch.lengths - 1).data
        loss = self.criterion(self.output(forward), targets)
        if self.shape.bidirectional:
            places = align(batch.lengths)
            row = places.rows.row.to(batch.tokens.device)
            back = places.backward_time.to(batch.tokens.device)
            embedded = PackedSequence(self.embedding(batch.tokens[back, row]), packed.batch_sizes)
            backward = self.stacks[1](embedded)[0].data
            loss = loss + self.criterion(self.output(backward), batch.tokens[back - 1, row])
            before = places.fill_forward.to(batch.tokens.device)
            sides = torch.cat([forward[before], backward[places.fill_backward.to(batch.tokens.device)]], 1)
            loss = loss + self.criterion(self.output(self.join(sides)), targets[before])
        return loss


def stock_training(shape: Shape, device: torch.device) -> Work:
    model = StockModel(shape).to(device)
    kind: Any = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[shape.optimizer]
    optimizer = kind(model.parameters(), lr=1e-3)
    batches = [Batch(batch.tokens.to(device), *batch[1:]) for batch in shape.batches(shape.vocab_size)]
    turn = cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(next(turn)).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Work(step, mean_tokens(batches), model=model)


def mean_tokens(batches: list[Batch]) -> int:
    return round(statistics.mean(int(batch.lengths.sum()) - len(batch.lengths) for batch in batches))


def stock_output(rows: int, size: int, vocab_size: int, device: torch.device) -> Work:
    layer, criterion = nn.Linear(size, vocab_size).to(device), nn.CrossEntropyLoss()
    states = torch.randn(rows, size, device=device, requires_grad=True)
    targets = torch.from_numpy(zipf(np.random.default_rng(1), vocab_size, rows)).to(device)

    def step() -> None:
        layer.zero_grad()
        states.grad = None
        criterion(layer(states), targets).backward()

    return Work(step, rows)


WRITTEN, PROMPT = 48, 8  # tokens of a continuation and, on average, of a prompt


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [zipf(random, vocab_size, int(n)).tolist() for n in random.integers(2, 2 * PROMPT - 1, count)]


def stock_generation(shape: Shape, count: int, device: torch.device) -> Work:
    model = StockModel(shape).to(device).eval()
    given = prompts(count, shape.vocab_size)

    @torch.no_grad()
    def write() -> None:
        for prompt in given:
            tokens, state = torch.tensor([BOS, *prompt], device=device).unsqueeze(1), None
            for _ in range(WRITTEN):
                states, state = model.stacks[0](model.embedding(tokens), state)
                tokens = model.output(states[-1]).argmax(-1).unsqueeze(0)
                if int(tokens) == EOS:
                    break

    return Work(write, WRITTEN * count)


# ---- lmtrain


def make_model(shape: Shape, device: torch.device) -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(
        shape.vocab_size,
        embedding_size=shape.hidden_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        cell=shape.cell,
        bidirectional=shape.bidirectional,
        tie_weights=shape.tied,
    )
    return model.to(device)


def training_step(shape: Shape, model: LanguageModel, precision: str) -> TrainingStep:
    """The step that `lmtrain train` takes, with Adam or plain SGD and the gradient clipped at 1."""
    name = {"adam": "adamw", "sgd": "sgd"}[shape.optimizer]
    settings = {"data": {"train": "none"}, "optimizer": {"name": name, "weight_decay": 0.0}}
    step = TrainingStep(Config.model_validate({"name": "benchmark", **settings}), model)
    step.precision = precision
    return step


def step_batch(batch: Batch, step: TrainingStep) -> RankBatch:
    """What a `BatchLoader` makes of a batch: on CUDA it lies on the device, as the other side's does."""
    layout = None if step.lay_out is None else step.lay_out(*batch)
    return RankBatch(batch, len(batch.lengths), int(batch.lengths.sum()), len(batch.tokens), layout=layout)


def training(shape: Shape, device: torch.device, precision: str) -> Work:
    precision, _ = choose_precision(precision, device, shape.hidden_size)
    keep_freed_memory()
    model = make_model(shape, device)
    step, made = training_step(shape, model, precision), shape.batches(shape.vocab_size)
    turn = cycle([[step_batch(batch, step)] for batch in made])
    tokens, steps = mean_tokens(made), statistics.mean(len(batch.tokens) - 1 for batch in made)
    return Work(lambda: step(next(turn), 1e-3), tokens, products_of_training(shape, tokens, steps), precision, model)


def forward_and_backward(rows: int, inner: int, outer: int, count: float = 1) -> list[Product]:
    """The three products of a layer: its output, and the gradients of its input and of its weight."""
    shapes = (rows, inner, outer), (rows, outer, inner), (outer, rows, inner)
    return [Product(count, *shape) for shape in shapes]


def products_of_training(shape: Shape, tokens: int, steps: float) -> list[Product]:
    """Those of one step over so many tokens, whose longest row has so many steps."""
    size, directions = shape.hidden_size, 1 + shape.bidirectional
    gates, rows = {"lstm": 4, "gru": 3}[shape.cell] * size, round(tokens / steps)
    of_layer = forward_and_backward(tokens, size, gates)
    of_layer += [Product(steps, rows, size, gates), Product(steps, rows, gates, size), Product(1, gates, tokens, size)]
    products = [replace(each, count=each.count * shape.num_layers * directions) for each in of_layer]
    if shape.bidirectional:
        products += forward_and_backward(tokens, 2 * size, size) + forward_and_backward(tokens, size, size)
    return products + forward_and_backward(tokens, size, shape.vocab_size, count=3 if shape.bidirectional else 1)


def output_layer(rows: int, size: int, vocab_size: int, device: torch.device) -> Work:
    precision, _ = choose_precision("auto", device, size)
    keep_freed_memory()
    layer = FullOutput(size, vocab_size).to(device)
    states = torch.randn(rows, size, device=device, requires_grad=True)
    targets = torch.from_numpy(zipf(np.random.default_rng(1), vocab_size, rows)).to(device)
    weights = torch.full((rows,), 1 / rows, device=device)

    def step() -> None:
        layer.zero_grad()
        states.grad = None
        with autocast(precision, device):
            loss = layer.loss(states, targets, weights).total
        loss.backward()

    return Work(step, rows, forward_and_backward(rows, size, vocab_size), precision)


def generation(shape: Shape, count: int, device: torch.device) -> Work:
    model = make_model(shape, device).eval()
    tokenizer = IdsTokenizer(shape.vocab_size - 2, pad_id=0)
    given = [" ".join(map(str, prompt)) for prompt in prompts(count, shape.vocab_size - 2)]
    written = sum(
        len(each.completion.split()) for each in generate(model, PromptCodec(tokenizer), given, max_tokens=WRITTEN)
    )
    assert written > 0.9 * WRITTEN * count
    return Work(lambda: generate(model, PromptCodec(tokenizer), given, max_tokens=WRITTEN), written)


def corpus_training(tokens: int, device: torch.device) -> Work:
    """A small model on a corpus of this many tokens in a memory-mapped file: batches drawn from all of it."""
    keep_freed_memory()
    random, folder = np.random.default_rng(1), tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tokens.bin"
    flat = np.memmap(path, np.uint16, "w+", shape=(tokens,))
    for start in range(0, tokens, 1 << 24):
        flat[start : start + (1 << 24)] = random.integers(3, 10_000, min(1 << 24, tokens - start))
    lengths = np.clip(random.normal(22, 9, tokens // 24).round(), 2, 60).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    offsets = offsets[offsets <= tokens].astype(np.uint64)
    sequences = argparse.Namespace(tokens=flat, offsets=offsets)
    rows, sampler = shuffled_rows(sequences, 512, batch_size=32, max_tokens=None, bucket_batches=150, seed=1)
    order = cycle(sampler.epoch(0))
    shape = Shape("lstm", 128, 1, 10_000, sentences)
    step = training_step(shape, make_model(shape, device), "fp32")

    def run() -> None:
        assert folder.name  # it lives as long as this
        for _ in range(10):
            step([step_batch(rows.batch(next(order), 0), step)], 1e-3)

    return Work(run, round(10 * 32 * (tokens / len(rows) - 1)))


# ---- the rows


@dataclass(frozen=True)
class Row:
    """A ratio: tokens a second of the first side over those of the second."""

    name: str
    what: str
    ours: Callable[[torch.device], Work]
    other: Callable[[torch.device], Work]
    at_least: float = TIMES_STOCK


def against_stock(name: str, what: str, shape: Shape, precision: str = "auto") -> Row:
    return Row(
        name, what, lambda device: training(shape, device, precision), lambda device: stock_training(shape, device)
    )


def all_rows() -> list[Row]:
    lstm, gru = Shape("lstm", 512, 2, 10_000, sentences), Shape("gru", 512, 2, 10_000, sentences)
    both = Shape("lstm", 512, 2, 10_000, sentences, bidirectional=True)
    equal = {
        (cell, size): Shape(cell, size, 2, 10_000, columns(20, 35), tied=True, optimizer="sgd")
        for cell in ("lstm", "gru")
        for size in (650, 200)
    }
    characters = Shape("lstm", 512, 1, 65, columns(32, 64))
    sizes = (1280, 256, 33_278)
    few = Shape("lstm", 256, 1, 10_000, columns(32, 32))
    many = Shape("lstm", 256, 1, 10_000, columns(1024, 32))
    return [
        against_stock("sentences-lstm", "sentences, LSTM 2x512, 32 rows, 10k vocabulary", lstm),
        against_stock("sentences-gru", "sentences, GRU 2x512", gru),
        against_stock("sentences-both", "sentences, LSTM 2x512, two directions, three losses", both),
        against_stock("equal-lstm-650", "20 rows of 35, LSTM 2x650 tied, 10k vocabulary", equal["lstm", 650]),
        against_stock("equal-gru-650", "20 rows of 35, GRU 2x650 tied", equal["gru", 650]),
        against_stock("equal-lstm-200", "20 rows of 35, LSTM 2x200 tied", equal["lstm", 200]),
        against_stock("equal-gru-200", "20 rows of 35, GRU 2x200 tied", equal["gru", 200]),
        against_stock("characters", "32 rows of 64, LSTM 1x512, 65 symbols", characters),
        against_stock("sentences-fp32", "sentences, LSTM 2x512, fp32 on both sides", lstm, "fp32"),
        Row(
            "output-layer",
            "output layer alone, 1,280 rows x 256 -> 33,278",
            lambda device: output_layer(*sizes, device),
            lambda device: stock_output(*sizes, device),
        ),
        Row(
            "generate-one",
            "greedy, LSTM 2x512, one prompt, against a plain step loop",
            lambda device: generation(lstm, 1, device),
            lambda device: stock_generation(lstm, 1, device),
        ),
        Row(
            "generate-many",
            "greedy, 64 ragged prompts, against a plain step loop, one at a time",
            lambda device: generation(lstm, 64, device),
            lambda device: stock_generation(lstm, 4, device),
        ),
        Row(
            "batch-growth",
            "batches of 32,768 tokens against 1,024, LSTM 1x256",
            lambda device: training(many, device, "auto"),
            lambda device: training(few, device, "auto"),
            SELF,
        ),
        Row(
            "corpus-growth",
            "a corpus of 500 MB against one of 10 MB, LSTM 1x128",
            lambda device: corpus_training(100_000_000, device),
            lambda device: corpus_training(2_000_000, device),
            SELF,
        ),
    ]


# ---- taking turns


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Work, times: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work.run()
    synchronise(device)
    return time.perf_counter() - start


def libraries(product: Product, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    """The ways in which PyTorch computes a product: MKL's by rows or by columns of the right operand (or cuBLAS), and
    oneDNN's, as they lie or after their weights were laid out anew."""
    left = torch.randn(product.rows, product.inner, device=device).to(dtype)
    right = torch.randn(product.inner, product.outer, device=device).to(dtype)
    turned = right.t().contiguous()  # (outer, inner), as oneDNN expects it
    ways = [lambda: left @ right, lambda: left @ turned.t()]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(turned, len(left))
        linear = torch.ops.mkldnn._linear_pointwise
        ways += [partial(linear, left, weight, None, "none", [], "") for weight in (turned, packed)]
    return ways


def median_seconds(way: Callable[[], Tensor], device: torch.device) -> float:
    """Of a product; the first one, which includes preparation, is left out."""
    work, times, taken_s = Work(way, 0), 1 if device.type == "cpu" else 20, list[float]()
    while len(taken_s) < 4 or sum(taken_s) < 0.005:
        taken_s.append(timed(work, times, device) / times)
    return statistics.median(taken_s[1:])


class Limit:
    """The products of one run of a work, each by the fastest library for its shape, and nothing else."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.device, self.ways = device, list[tuple[float, Callable[[], Tensor]]]()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.precision]
        for product in work.products:
            ways = libraries(product, dtype, device)
            self.ways.append((product.count, min(ways, key=lambda way: median_seconds(way, device))))

    def seconds(self) -> float:
        return sum(count * median_seconds(way, self.device) for count, way in self.ways)


def serve(row: Row, side: str, device: torch.device) -> None:
    """One side's process: for each line on standard input, a burst of about that many seconds."""
    if side == "ours":  # as `lmtrain train` sets it
        set_variables()
        device = choose_device(device.type)
        make_deterministic(device)
    elif device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    work = (row.ours if side == "ours" else row.other)(device)
    limit = Limit(work, device)
    for _ in range(3):
        once_s = timed(work, 1, device)
    said = {"threads": torch.get_num_threads(), "precision": work.precision, "device": "cpu", "device_mb": 0}
    if device.type == "cuda":
        said["device"] = torch.cuda.get_device_name(device)
        once_s = timed(work, BATCHES, device) / BATCHES  # each shape of a batch is met once
    for line in chain(["ready"], sys.stdin):
        if line != "ready":
            times = max(1, round(float(line) / once_s))
            said["tokens_per_second"] = work.tokens * times / timed(work, times, device)
            said["limit"] = work.tokens / limit.seconds() if work.products else None
            if device.type == "cuda":
                said["device_mb"] = torch.cuda.max_memory_allocated(device) // 10**6
        print(json.dumps(said), flush=True)


class Side:
    """The process of one side of a row."""

    def __init__(self, row: Row, side: str, device: str) -> None:
        command = [sys.executable, __file__, "--serve", row.name, side, "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} has failed")  # type: ignore[arg-type]
        said: dict[str, Any] = json.loads(line)
        return said

    def burst(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(row: Row, device: str, pairs: int, burst_s: float) -> dict[str, Any]:
    """One row: its sides in turn."""
    sides = [Side(row, side, device) for side in ("ours", "other")]
    for side in sides:
        first = side.hear()
    turns = [[side.burst(burst_s) for side in sides] for _ in range(pairs)]
    for side in sides:
        side.close()
    ratios, shares, needed = [], [], []
    for ours, other in turns:
        ratios.append(ours["tokens_per_second"] / other["tokens_per_second"])
        if ours["limit"] is not None:
            shares.append(ours["tokens_per_second"] / ours["limit"])
            limit = ours["limit"] / other["tokens_per_second"]
            needed.append(max(SHARE * limit, min(row.at_least, LARGE_SHARE * limit)))
    speeds = [statistics.median(turn[side]["tokens_per_second"] for turn in turns) for side in range(len(sides))]
    return {
        "row": row.name,
        "ratio": round(statistics.median(ratios), 3),
        "at_least": round(statistics.median(needed or [row.at_least]), 3),
        "share": round(statistics.median(shares), 3) if shares else None,
        "tokens_per_second": round(speeds[0], 1),
        "other_tokens_per_second": round(speeds[1], 1),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "precision": turns[0][0]["precision"],
        "threads": first["threads"],
        "device": first["device"],
        "device_mb": [said["device_mb"] for said in turns[0]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = {row.name: row for row in all_rows()}
    parser.add_argument("--row", action="append", choices=list(rows), metavar="NAME", help=", ".join(rows))
    parser.add_argument("--quick", action="store_true", help="three short turns a row instead of seven longer ones")
    parser.add_argument("--json", action="store_true", help="an object a row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, side = options.serve
        return serve(rows[name], side, torch.device(options.device))
    if not options.json:
        print("| row | | ratio | at least | share | tokens/s | the other | precision |")
        print("|---|---|---:|---:|---:|---:|---:|---|")
    for name in options.row or rows:
        row = rows[name]
        long = (5, 0.5) if options.device == "cuda" else (7, 1.5)
        result = measure(row, options.device, *((3, 0.4) if options.quick else long))
        if options.json:
            print(json.dumps(result), flush=True)
        else:
            print(
                f"| `{row.name}` | {row.what} | {result['ratio']:.2f} | {result['at_least']:.2f} | "
                f"{'' if result['share'] is None else format(result['share'], '.2f')} | "
                f"{result['tokens_per_second']:,.0f} | {result['other_tokens_per_second']:,.0f} | "
                f"{result['precision']} |",
                flush=True,
            )
    if not options.json:
        print(f"\n{result['device']}, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
