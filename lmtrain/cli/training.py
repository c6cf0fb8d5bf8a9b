"""`lmtrain prepare`, `lmtrain train` and `lmtrain check`."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lmtrain.cli.terminal import DeviceOption, JsonOption, print_json, silence_stdout, standard_input_as_file
from lmtrain.errors import ConfigError, escape
from lmtrain.system.console import say

if TYPE_CHECKING:
    from lmtrain.cli.terminal import Device
    from lmtrain.config import Config
    from lmtrain.system.progress import Progress

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
OVERRIDES_HELP = "Config keys to change, for instance model.hidden_size=256."
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES_HELP)]
RUN_DIR_HELP = "The run directory, new or empty; default: the config's runs_dir/name."
SHOW_HELP, MOST_SHOWN = "How many sequences of the training text to show as tokens.", 10_000
RESUME_HELP = "Continue from the last good checkpoint; start afresh if there is none."


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    run_dir: Annotated[str | None, typer.Option(metavar="DIR", help=RUN_DIR_HELP)] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    device: DeviceOption = None,
) -> None:
    """Train the model that a config describes."""
    from lmtrain.system.processes import launched_by_torchrun

    load, is_one_of_several = partial(_load, config, overrides, device), launched_by_torchrun()
    settings = load if is_one_of_several else load()
    if callable(settings):
        # one of the processes prints a fault for all of them; PyTorch would print its own warnings beside it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    elif resume:
        from lmtrain.runs.directory import find_resumable

        if (run := find_resumable(settings, run_dir)) is not None:
            run.config_and_tokenizer()  # before torch is imported
    from lmtrain.system.device import keep_freed_memory
    from lmtrain.training.start import train as run_training

    keep_freed_memory()
    is_first = not is_one_of_several or os.environ["RANK"] == "0"
    result = run_training(settings, run_dir, resume=resume, progress=_progress() if is_first else None)
    if not is_first:
        return
    words = ", ".join(f"{tag.partition('/')[2]} {value:.4f}" for tag, value in result.figures.items())
    with suppress(OSError):  # the training succeeded, whether or not its result can be printed
        if words:
            measured = "training" if result.best_step is None else f"best validation (step {result.best_step})"
            print(f"{measured}: {words}")
        print(f"{result.run}: {result.step} steps. Next: lmtrain generate {result.run}", flush=True)
        return
    silence_stdout()


def _load(config: str, overrides: list[str] | None, device: Device | None) -> Config:
    """Load the config with its overrides; `--device` acts as one more."""
    from lmtrain.config import load_config

    by_option = [] if device is None else [f"training.device={device}"]
    return load_config(config, [*(overrides or []), *by_option])


def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run such as runs/quickstart.")],
    overrides: OverridesArgument = None,
    device: DeviceOption = None,
    show: Annotated[int, typer.Option(metavar="N", min=0, max=MOST_SHOWN, help=SHOW_HELP)] = 3,
    as_json: JsonOption = False,
) -> None:
    """Check a config and its data, or a run's files.

    Prints all faults at once. For a config without faults, prints what its data holds and what training would cost.
    """
    if os.path.isdir(config):
        if overrides or device:
            raise ConfigError(f"check {config}: a run is checked as it is; leave out KEY=VALUE and --device")
        if as_json:
            raise ConfigError(f"check {config}: --json is for a config; the parts of a run are printed as lines")
        from lmtrain.runs.directory import find_run

        run = find_run(config)
        run.config_and_tokenizer()
        from lmtrain.check.run import inspect_run

        for line in inspect_run(run):
            print(escape(line))
    else:
        with standard_input_as_file(overrides or [], "data.train=-") as (keys, named_as):
            settings = _load(config, keys, device)
            from lmtrain.check.configuration import describe_configuration
            from lmtrain.system.device import keep_freed_memory

            keep_freed_memory()
            for finding in describe_configuration(settings, lambda line: say(named_as(line)), show):
                if as_json:
                    print_json(json.loads(named_as(json.dumps(finding.row))))
                    continue
                for line in finding.lines:
                    print(escape(named_as(line)))


def prepare(config: ConfigArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Only cut the text into tokens, as `train` does first.

    Learns the tokenizer and brings the token stores up to date. After an interruption it continues where it stopped.
    """
    settings = _load(config, overrides, None)
    from lmtrain.data.preparation import prepare_all

    progress, start_s = _progress(), time.monotonic()
    try:
        tokenizer, stores = prepare_all(settings, progress.note, progress.reading)
    finally:
        progress.close()
    took_s = time.monotonic() - start_s
    if as_json:
        for name, store in stores.items():
            facts = {"store": name, "directory": str(store.directory), "size_bytes": store.size_bytes}
            facts |= {"vocabulary": tokenizer.vocab_size, "built": store.is_new, **asdict(store.counts)}
            del facts["checksums"]
            print_json(facts)
        return
    print(f"vocabulary: {tokenizer.vocab_size:,} tokens ({tokenizer.kind})")
    for name, store in stores.items():
        print(escape(f"{name}: {store.counts.summary()}; {store.size_bytes / 1e6:,.1f} MB in {store.directory}"))
    read_mb = sum(store.counts.bytes for store in stores.values() if store.is_new) / 1e6
    if read_mb and not any(store.was_continued for store in stores.values()):
        print(f"{read_mb:,.1f} MB of text in {took_s:,.1f} s: {read_mb / took_s:.1f} MB/s")
    print(escape(f"Next: lmtrain train {config}"))


def _progress() -> Progress:
    from lmtrain.system.progress import Bar, Lines

    return Bar() if sys.stderr.isatty() else Lines()
