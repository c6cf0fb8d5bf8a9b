"""`lmtrain evaluate`, `score`, `fill`, `embed` and `export`: what a trained run does beside writing text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    standard_input_as_file,
)
from lmtrain.errors import ConfigError, escape
from lmtrain.inference.options import check_export, check_new
from lmtrain.system.console import say

if TYPE_CHECKING:
    from lmtrain.data.text.reading import Block
    from lmtrain.inference.trained_model import TrainedModel

SourceArgument = Annotated[
    str | None, typer.Argument(metavar="[FILE|-]", help="A file of lines; left out, standard input.")
]


def evaluate(
    run: RunArgument = None,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE ...]", help="Text files, or -; default the run's test set, else its validation set."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per batch; the figures do not depend on it.")
    ] = None,
    cache: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Stream: report the perplexity with a neural cache of N tokens, too."),
    ] = None,
    cache_theta: Annotated[float, typer.Option(min=0.0, help="How much similar contexts count in the cache.")] = 0.3,
    cache_share: Annotated[float, typer.Option(min=0.0, max=0.99, help="Weight of the cache in the mixture.")] = 0.1,
    dynamic: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="RATE", help="Stream: report dynamic evaluation at this learning rate, too."),
    ] = None,
    dynamic_decay: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the way back to the trained weights per chunk.")
    ] = 0.0,
    dynamic_steps: Annotated[int, typer.Option(min=1, help="Tokens in a chunk; the model then learns from it.")] = 20,
    worst: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Print the N lines with the most nats per token, too.")
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Print a trained model's perplexity on text. If RUN is a file, the newest run reads it."""
    paths: list[str] = files or []
    if run is not None and (run == "-" or Path(run).is_file()):
        paths = [run, *paths]
        run = None
    model = load_model(run, device)
    from lmtrain.inference.adaptation import Cache, Dynamic

    adapting = (
        None if cache is None else Cache(cache, cache_theta, cache_share),
        None if dynamic is None else Dynamic(dynamic, dynamic_decay, dynamic_steps),
    )
    with standard_input_as_file(paths) as (paths, named_as):
        figures: dict[str, Any] = model.evaluate(paths, batch_size, *adapting).figures()
        lines = [] if worst is None else model.worst_lines(paths, worst)
    lines = [(named_as(place), line, text) for place, line, text in lines]
    if as_json:
        if worst is not None:
            figures["worst"] = [
                {"place": place, "nats_per_token": line.nats_per_token, "text": text} for place, line, text in lines
            ]
        print_json(figures)
        return
    print(f"{model.run}, step {model.step}")
    for name, value in figures.items():
        if value is not None:
            print(f"{name.replace('_', ' '):35} {value:{',' if isinstance(value, int) else '.4f'}}")
    for place, line, text in lines:
        print(escape(f"{line.nats_per_token:9.4f}  {place}  {text}"))


def score(
    run: RunArgument = None,
    source: SourceArgument = None,
    direction: Annotated[
        Literal["forward", "backward", "both"],
        typer.Option(help="Reading direction; both gives the mean of the two log-probabilities."),
    ] = "forward",
    base: Annotated[Literal["e", "2", "10"], typer.Option(help="Base of the logarithm.")] = "e",
    tokens: Annotated[bool, typer.Option("--tokens", help="Print the log-probability of every token, too.")] = False,
    as_json: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Print the log-probability of every line. If RUN is a file and FILE is left out, the newest run reads it."""
    run, source = _run_and_source(run, source)
    model = load_model(run, device)
    unit = {"e": 1.0, "2": math.log(2), "10": math.log(10)}[base]
    for line in model.score(_lines(source, model), direction, each=tokens):
        log_probability = line.log_probability / unit
        if as_json:
            row: dict[str, Any] = {
                "line": line.line,
                "log_probability": log_probability if math.isfinite(log_probability) else None,
                "tokens": line.tokens,
                "unknown_tokens": line.unknown_tokens,
                "perplexity": line.perplexity if math.isfinite(line.perplexity) else None,
            }
            if tokens:
                row["each"] = [{"text": text, "log_probability": value / unit} for text, value in line.each]
            print_json(row)
            continue
        print(f"{log_probability:.4f}")
        for text, value in line.each:
            print(f"  {value / unit:10.4f}  {escape(repr(text)[1:-1])}")


def _run_and_source(run: str | None, source: str | None) -> tuple[str | None, str | None]:
    """Take a single argument that is a file, or `-`, for the text and not for the run."""
    only_source = run is not None and source is None and (run == "-" or Path(run).is_file())
    return (None, run) if only_source else (run, source)


def _lines(source: str | None, model: TrainedModel) -> Iterator[Block]:
    """Read the texts of a file, or of standard input as plain text, a block at a time."""
    from lmtrain.data.text.formats.table import read_plain_text

    if source is None or source == "-":
        data = model.config.data
        return read_plain_text(sys.stdin.buffer, "standard input", data.separator, data.encoding)
    return model.read(source)


def embed(
    run: RunArgument = None,
    source: SourceArgument = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="OUT.npz", help="The new file to write.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Write the hidden states of every line for numpy.load: ids, lengths, output (of each token), h_n (of each line).

    If RUN is a file and FILE is left out, the newest run reads it.
    """
    run, source = _run_and_source(run, source)
    if output is None:
        raise ConfigError("embed: name the file to write: -o OUT.npz")
    if not output.endswith(".npz"):
        raise ConfigError(f"-o {output}: embed writes an .npz file; let its name end with .npz")
    check_new(Path(output), "file")
    model = load_model(run, device)
    count = model.embed(_lines(source, model), output)
    say(f"{output}: vectors of {count:,} lines")


def export(
    run: RunArgument = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="The new folder to write.")
    ] = None,
    format: Annotated[
        Literal["onnx", "safetensors"],
        typer.Option(help="One step as an ONNX graph, or weights by the names of torch.nn."),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: weights in 8 bits; compares size, speed and perplexity.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Write the model and its tokenizer into a folder, for programs that do not have lmtrain."""
    if output is None:
        raise ConfigError("export: name the folder to write: -o FOLDER")
    check_export(Path(output), format, int8)
    for line in load_model(run, device).export(output, format, int8):
        say(line)


def fill(
    run: RunArgument = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text with one blank: ____")] = None,
    top: Annotated[int, typer.Option(min=1, help="Largest number of fillings.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, max=32, help="Largest number of tokens in a filling.")] = 1,
    as_json: JsonOption = False,
    raw: RawOption = False,
    device: DeviceOption = None,
) -> None:
    """Print what may stand in the blank ____ of a text, given both its sides, best first."""
    if text is None:  # a single argument is the text, for the newest run
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
