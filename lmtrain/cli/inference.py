"""`lmtrain evaluate`, `score`, `fill`, `embed` and `export`: what a trained run is put to, but for writing."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.cli.terminal import (
    DeviceOption,
    JsonOption,
    RawOption,
    RunArgument,
    check_text,
    load_model,
    named,
    print_json,
)
from lmtrain.errors import ConfigError, escape
from lmtrain.system.console import say

if TYPE_CHECKING:
    from lmtrain.data.text.reading import Block
    from lmtrain.inference.scoring import Score
    from lmtrain.inference.trained_model import TrainedModel

SourceArgument = Annotated[
    str | None, typer.Argument(metavar="[FILE|-]", help="Text, a line each; left out, standard input.")
]


class Directions(StrEnum):
    forward = "forward"
    backward = "backward"
    both = "both"


class Base(StrEnum):
    e = "e"
    two = "2"
    ten = "10"


def evaluate(
    run: RunArgument = None,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE ...]", help="Text; default the run's test set, else validation."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at once; the figures do not depend on it.")
    ] = None,
    cache: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stream: mix in a neural cache of the last N tokens, reported beside."),
    ] = None,
    cache_theta: Annotated[float, typer.Option(min=0.0, help="How much likeness counts in the cache.")] = 0.3,
    cache_share: Annotated[float, typer.Option(min=0.0, max=0.99, help="Weight of the cache in the mixture.")] = 0.1,
    dynamic: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="RATE", help="Stream: learn from each chunk once it is scored, reported beside."),
    ] = None,
    dynamic_decay: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="What is taken back of it at each chunk.")
    ] = 0.0,
    dynamic_steps: Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")] = 20,
    worst: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The N lines that cost most nats a token, too.")
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Print a trained model's perplexity on text."""
    paths: list[str] = files or []
    if run is not None and Path(run).is_file():  # a file where the run may stand: the newest run is meant
        paths = [run, *paths]
        run = None
    model = load_model(run, device)
    from lmtrain.inference.adaptation import Cache, Dynamic

    figures: dict[str, Any] = model.evaluate(
        paths,
        batch_size,
        None if cache is None else Cache(cache, cache_theta, cache_share),
        None if dynamic is None else Dynamic(dynamic, dynamic_decay, dynamic_steps),
    ).figures()
    lines = [] if worst is None else model.worst_lines(paths, worst)
    if as_json:
        if worst is not None:
            figures = figures | {"worst": [_worst(*line) for line in lines]}
        print_json(figures)
        return
    print(f"{model.run}, step {model.step}")
    for name, value in figures.items():
        if value is not None:
            print(
                f"{name.replace('_', ' '):35} {value:,}"
                if isinstance(value, int)
                else f"{name.replace('_', ' '):35} {value:.4f}"
            )
    for line in (_worst(*each) for each in lines):
        print(escape(f"{line['nats_per_token']:9.4f}  {line['place']}  {line['text']}"))


def _worst(place: str, found: Score, text: str) -> dict[str, Any]:
    """One of the worst lines."""
    return {"place": place, "nats_per_token": found.nats_per_token, "text": text}


def score(
    run: RunArgument = None,
    source: SourceArgument = None,
    direction: Annotated[
        Directions, typer.Option(help="How to read; both: the mean of the two log-probabilities.")
    ] = Directions.forward,
    base: Annotated[Base, typer.Option(help="Of the logarithm.")] = Base.e,
    tokens: Annotated[bool, typer.Option("--tokens", help="Every token's own log-probability, too.")] = False,
    as_json: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Print the log-probability of every line: how likely the model finds it."""
    run, source = _run_and_source(run, source)
    model = load_model(run, device)
    unit = {"e": 1.0, "2": math.log(2), "10": math.log(10)}[base.value]
    for found in model.score(_lines(source, model), direction.value, each=tokens):
        log_probability = found.log_probability / unit
        if as_json:
            row: dict[str, Any] = {
                "line": found.line,
                "log_probability": log_probability if math.isfinite(log_probability) else None,
                "tokens": found.tokens,
                "unknown_tokens": found.unknown_tokens,
                "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
            }
            if tokens:
                row["each"] = [{"text": text, "log_probability": value / unit} for text, value in found.each]
            print_json(row)
            continue
        print(f"{log_probability:.4f}")
        for text, value in found.each:
            print(f"  {value / unit:10.4f}  {escape(repr(text)[1:-1])}")


def _run_and_source(run: str | None, source: str | None) -> tuple[str | None, str | None]:
    """A file where the run may stand: the newest run is meant."""
    alone = run is not None and source is None and (run == "-" or Path(run).is_file())
    return (None, run) if alone else (run, source)


def _lines(source: str | None, model: TrainedModel) -> Iterator[Block]:
    """The lines of a file or of standard input, a block at a time."""
    from lmtrain.data.text.formats.text import read_lines_of

    if source is None or source == "-":
        return read_lines_of(sys.stdin.buffer, "standard input")
    return model.read(source)


def embed(
    run: RunArgument = None,
    source: SourceArgument = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="OUT.npz", help="The file to write; a new one.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Write every line as vectors: ids, lengths, output (a state a token) and h_n (a state a line), for numpy.load."""
    run, source = _run_and_source(run, source)
    if output is None:
        raise ConfigError("embed: name the file to write: -o OUT.npz")
    if not output.endswith(".npz"):
        raise ConfigError(f"-o {output}: an .npz file is written; name it so")
    if Path(output).exists():
        raise ConfigError(f"{output}: is there already; name a new file")
    model = load_model(run, device)
    count = model.embed(_lines(source, model), output)
    say(f"{output}: vectors of {count:,} lines")


class ExportFormat(StrEnum):
    onnx = "onnx"
    safetensors = "safetensors"


def export(
    run: RunArgument = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write; a new one.")
    ] = None,
    format: Annotated[
        ExportFormat, typer.Option(help="A step as an ONNX graph, or weights as torch.nn names them.")
    ] = ExportFormat.onnx,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: weights in 8 bits; tells size, speed, perplexity.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Write the model and its tokenizer into a folder, for programs that have no lmtrain."""
    if output is None:
        raise ConfigError("export: name the folder to write: -o FOLDER")
    if Path(output).exists():
        raise ConfigError(f"{output}: is there already; name a new folder")
    if int8 and format == ExportFormat.safetensors:
        raise ConfigError("--int8 is for --format onnx; safetensors holds the weights as they are")
    for line in load_model(run, device).export(output, format.value, int8):
        say(line)


def fill(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run directory; left out, the newest.")] = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text with one blank: ____")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many fillings to print.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, max=32, help="Tokens in a filling, at most.")] = 1,
    as_json: JsonOption = False,
    raw: RawOption = False,
    device: DeviceOption = None,
) -> None:
    """Print what may stand in the blank ____ of a text, by both its sides, best first."""
    if text is None:  # one argument: the text, for the newest run
        run, text = None, run
    if text is None:
        raise ConfigError("fill: name a text with one blank: lmtrain fill 'the ____ sat'")
    check_text("text", text)
    model = load_model(run, device)
    if unknown := model.unknown_tokens(text.replace("____", " ")):
        say(f"note: {named(unknown)} unknown to the model, read as <unk>")
    for filling in model.fill(text, top, tokens):
        if as_json:
            print_json({"text": filling.text, "probability": filling.probability})
        else:
            shown = filling.filled if raw or not sys.stdout.isatty() else escape(filling.filled)
            print(f"{filling.probability:.4f}  {shown}")
