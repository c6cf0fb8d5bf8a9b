"""The command line: each command parses, calls one function and prints; it imports torch only if it needs it."""

import errno
import io
import os
import sys
import warnings
from typing import Annotated

import typer
from typer.exceptions import TyperException

from lmtrain.cli import generation, inference, training
from lmtrain.cli.terminal import silence_lost_stderr, silence_stdout
from lmtrain.data.tokenizers.library import discard_panics
from lmtrain.errors import LmtrainError, escape, out_of_memory
from lmtrain.system.console import say
from lmtrain.system.variables import set_variables
from lmtrain.system.version import __version__

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


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"lmtrain {__version__}")
        raise typer.Exit


MODEL_COMMANDS = (inference.evaluate, inference.score, inference.fill, inference.embed, inference.export)
for command in (training.prepare, training.train, generation.generate, *MODEL_COMMANDS, training.check):
    app.command()(command)


def main() -> None:
    """Run a command and exit with its code. A user's mistake prints a line for each fault, never a traceback."""
    set_variables()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {str(message).partition(chr(10))[0]}\n"
    try:
        code = _run()
        silence_lost_stderr()
        sys.exit(code)
    except KeyboardInterrupt:  # a second one, while the first was handled
        os._exit(130)


def _run() -> int:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # open until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        shown = sys.stdout.isatty()  # else a file or a pipe gets on every system what lmtrain reads: UTF-8, \n
        sys.stdout.reconfigure(
            encoding=None if shown or "PYTHONIOENCODING" in os.environ else "utf-8",
            errors="backslashreplace",  # if the encoding lacks a character
            newline=None if shown else "\n",
        )
    try:
        with discard_panics():
            # Typer would expand patterns on Windows, texts included; lmtrain expands those of files itself
            code = app(standalone_mode=False, windows_expand_args=False)
        sys.stdout.flush()
        return int(code or 0)
    except LmtrainError as error:
        for fault in error.faults:
            say(fault)
        return error.exit_code
    except TyperException as error:
        message = error.format_message()
        say(message if "\n" in message else f"lmtrain: {message} (lmtrain --help)")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (BrokenPipeError, SystemExit):  # the reader of our output has gone, for instance `head`; typer exits then
        silence_stdout()
        return 0
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if (memory := out_of_memory(error, "the model or its batches are too large for this machine")) is not None:
            say(str(memory))
            return memory.exit_code
        if not isinstance(error, OSError):
            raise
        if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:
            silence_stdout()  # Windows says so when the reader has gone
            return 0
        say(escape(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}", kept=""))
        silence_stdout()
        return 5
