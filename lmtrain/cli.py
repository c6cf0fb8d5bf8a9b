"""The command line: parse, call one function, print. Torch is imported inside the commands that need it."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from lmtrain.errors import ConfigError, LmtrainError

if TYPE_CHECKING:
    from lmtrain.config import Config
    from lmtrain.training.tracking import Progress

LARGEST_PROMPTS_BYTES = 64 << 20

app = typer.Typer(
    name="lmtrain",
    help="Train recurrent language models (LSTM, GRU, RNN; one direction or two) from a YAML file, and use them.",
    epilog="Start with: lmtrain train configs/quickstart.yaml && lmtrain generate",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Config keys to change: model.hidden_size=256"),
]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="A run directory; left out, the newest under runs/.")
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to compute; auto: cuda where there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, nothing else.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lmtrain {installed('lmtrain')}")
        raise typer.Exit


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The run directory, new or empty; default runs_dir/name."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last good checkpoint; afresh where there is none."),
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Train the model that a config describes."""
    settings = _load(config, overrides, device)
    from lmtrain.training.start import train as run_training

    result = run_training(settings, run_dir, resume=resume, progress=_progress())
    words = ", ".join(f"{tag.partition('/')[2]} {value:.4f}" for tag, value in result.figures.items())
    with suppress(OSError):  # trained is trained, whether or not it can be told
        if words:
            print(
                f"{'training' if result.best_step is None else f'best validation (step {result.best_step})'}: {words}"
            )
        print(f"{result.run}: {result.step} steps. Next: lmtrain generate {result.run}", flush=True)
        return
    _silence_stdout()


def _load(config: str, overrides: list[str] | None, device: Device | None) -> Config:
    """The config with its overrides; `--device` is one more."""
    from lmtrain.config import load_config

    more = [] if device is None else [f"training.device={device}"]
    return load_config(config, [*(overrides or []), *more])


@app.command()
def generate(
    run: RunArgument = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to go on with; repeatable.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE|-", help="A file of prompts, one a line.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest text, where no end token comes before.")
    ] = None,
    as_json: JsonOption = False,
    raw: Annotated[bool, typer.Option("--raw", help="Leave control characters as they are on a terminal.")] = False,
    device: DeviceOption = None,
) -> None:
    """Write text greedily until the end token. Without a prompt, the model starts by itself."""
    texts = [*(prompt or []), *(_read_prompts(prompts) if prompts is not None else [])]
    if prompts is not None and not texts:
        raise ConfigError(f"--prompts {prompts}: holds no prompt")
    for text in texts:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"prompt {text[:60]!r}: not text (a NUL, or bytes that are not UTF-8)")
    import lmtrain

    model = lmtrain.load(run, device or "auto", _tell)
    for text in texts:
        if unknown := model.unknown_tokens(text):
            _tell(f"note: prompt {text[:60]!r}: {unknown} of its tokens unknown to the model, read as <unk>")
    for result in model.generate(texts or [""], max_tokens):
        if as_json:
            finite = math.isfinite(result.log_probability)
            row = vars(result) if finite else vars(result) | {"log_probability": None}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(result.text if raw or not sys.stdout.isatty() else escape(result.text))


def _read_prompts(source: str) -> list[str]:
    """The lines of a file or of standard input; a line ends at a newline and nowhere else, as in training text."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(LARGEST_PROMPTS_BYTES + 1)
        else:
            with open(source, "rb") as handle:
                data = handle.read(LARGEST_PROMPTS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--prompts {source}: {(error.strerror or 'can not be read').lower()}") from None
    if len(data) > LARGEST_PROMPTS_BYTES:
        raise ConfigError(f"--prompts {source}: over {LARGEST_PROMPTS_BYTES >> 20} MiB; cut it into parts")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {source}: byte {error.start} is not UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


@app.command()
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
    as_json: JsonOption = False,
    device: DeviceOption = None,
) -> None:
    """Print a trained model's perplexity on text."""
    paths: list[str] = files or []
    if run is not None and Path(run).is_file():  # a file where the run may stand: the newest run is meant
        paths = [run, *paths]
        run = None
    import lmtrain
    from lmtrain.inference.adaptation import Cache, Dynamic

    model = lmtrain.load(run, device or "auto", _tell)
    figures = model.evaluate(
        paths,
        batch_size,
        None if cache is None else Cache(cache, cache_theta, cache_share),
        None if dynamic is None else Dynamic(dynamic, dynamic_decay, dynamic_steps),
    ).figures()
    if as_json:
        print(json.dumps(figures))
        return
    print(f"{model.run}, step {model.step}")
    for name, value in figures.items():
        if value is not None:
            print(
                f"{name.replace('_', ' '):20} {value:,}"
                if isinstance(value, int)
                else f"{name.replace('_', ' '):20} {value:.4f}"
            )


@app.command()
def check(config: ConfigArgument, overrides: OverridesArgument = None, device: DeviceOption = None) -> None:
    """Report the faults of the config and of every data file at once, and what the data holds; trains nothing."""
    settings = _load(config, overrides, device)
    from lmtrain.training.report import describe

    for line in describe(settings, _tell):
        print(line)


def _progress() -> Progress:
    from lmtrain.training.tracking import Bar, Lines

    return Bar() if sys.stderr.isatty() else Lines()


def escape(text: str) -> str:
    """Text whose control characters are written out (`\\x1b`), so that it can't drive a terminal."""

    def written_out() -> Iterator[str]:
        for character in text:
            if unicodedata.category(character) == "Cc" and character not in "\n\t":
                yield f"\\x{ord(character):02x}"
            else:
                yield character

    return "".join(written_out())


def _tell(line: str) -> None:
    print(escape(line), file=sys.stderr, flush=True)


def main() -> None:
    """Run a command and leave with its exit code; a user's mistake is a line for each fault, never a traceback."""
    sys.exit(_run())


def _run() -> int:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an encoding that lacks a character is no reason to stop
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except LmtrainError as error:
        for fault in error.faults:
            _tell(fault)
        return error.exit_code
    except TyperException as error:
        message = error.format_message()
        _tell(message if "\n" in message else f"lmtrain: {message} (lmtrain --help)")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        _silence_stdout()
        return 0
    except OSError as error:
        _tell(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}")
        _silence_stdout()
        return 5
    except (MemoryError, RuntimeError) as error:
        if "torch" in sys.modules or isinstance(error, MemoryError):
            from lmtrain.runtime import out_of_memory

            if (memory := out_of_memory(error, "the model or its batches are too large for this machine")) is not None:
                _tell(str(memory))
                return memory.exit_code
        raise


def _silence_stdout() -> None:
    """Nothing more can be written there, not even what Python would flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
