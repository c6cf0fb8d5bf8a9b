"""`lmtrain generate`: text that a trained run writes."""

from __future__ import annotations

import math
import sys
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
from lmtrain.system.console import decode_utf8, say

if TYPE_CHECKING:
    from lmtrain.inference.beam import Beams
    from lmtrain.inference.generation import Generation
    from lmtrain.inference.sampling import Sampling

LARGEST_PROMPTS_BYTES = 64 << 20


def generate(
    run: RunArgument = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to go on with; repeatable.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE|-", help="A file of prompts, one a line.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Longest text, where no end token comes before.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Draw at random: below 1 the safer, above 1 the wilder; 0: greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the K most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the most probable tokens that hold this share.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Draw from tokens with this share of the best one's probability."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="Above 1: tokens that were there already become less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same texts; default 0.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Texts to each prompt, of a drawing or a search.")] = 1,
    beams: Annotated[
        int | None, typer.Option(min=1, max=1 << 16, help="Search for the most probable text, N at a time.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="With beams: rank by log-probability / tokens ** this; default 0.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Write what comes before the prompt (runs of two directions).")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    show_probabilities: Annotated[
        bool, typer.Option("--show-probabilities", help="Every token written, with its probability.")
    ] = False,
    as_json: JsonOption = False,
    raw: RawOption = False,
    device: DeviceOption = None,
) -> None:
    """Write text greedily until the end token. Without a prompt, the model starts by itself."""
    texts = [*(prompt or []), *(_read_prompts(prompts) if prompts is not None else [])]
    if prompts is not None and not texts:
        raise ConfigError(f"--prompts {prompts}: holds no prompt")
    for text in texts:
        check_text("prompt", text)
    for text in stop or []:
        check_text("--stop", text)
        if not text:
            raise ConfigError("--stop: an empty text stands everywhere")
    given = {
        "repetition_penalty": repetition_penalty,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    sampling, search = _sampling(given), _beams(beams, length_penalty)
    if search is not None and (sampling is not None or stop):
        raise ConfigError("--beams searches for the most probable text; leave out --stop and what draws at random")
    if count > 1 and search is None and (sampling is None or sampling.temperature == 0):
        raise ConfigError("--count: the most probable text is one; add --temperature, or --beams")
    if search is not None and count > search.width:
        raise ConfigError(f"--count {count}: --beams {search.width} finds no more than {search.width} texts")
    if stream and (len(texts) > 1 or count > 1 or search or backward or as_json or show_probabilities):
        raise ConfigError(
            "--stream prints one text as it comes; leave out other prompts, --count, --beams, --backward, --json and "
            "--show-probabilities"
        )
    model = load_model(run, device)
    for text in texts:
        if unknown := model.unknown_tokens(text):
            say(f"note: prompt {text[:60]!r}: {named(unknown)} unknown to the model, read as <unk>")
    plain = raw or not sys.stdout.isatty()
    if stream:
        start = (texts or [""])[0]
        print(start if plain else escape(start), end="", flush=True)
        for piece in model.stream(start, max_tokens, sampling=sampling, stop=stop or ()):
            print(piece if plain else escape(piece), end="", flush=True)
        print()
        return
    for result in model.generate(
        texts or [""],
        max_tokens,
        sampling=sampling,
        beams=search,
        count=count,
        stop=stop or (),
        backward=backward,
    ):
        if as_json:
            print_json(_row(result, show_probabilities))
            continue
        print(result.text if plain else escape(result.text))
        if show_probabilities:
            for token, log_probability in result.tokens:
                print(f"  {math.exp(log_probability):8.6f}  {escape(repr(token)[1:-1])}")


def _sampling(given: dict[str, Any]) -> Sampling | None:
    """How to draw, by the options that were given; None where none was. A penalty alone leaves the text greedy."""
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    drawn = given.keys() & {"top_k", "top_p", "min_p", "seed"}
    if given.get("temperature") == 0 and drawn:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(drawn))
        raise ConfigError(f"--temperature 0 draws nothing at random: leave out {names}")
    from lmtrain.inference.sampling import Sampling

    return Sampling(**({} if drawn or "temperature" in given else {"temperature": 0.0}) | given)


def _beams(width: int | None, length_penalty: float | None) -> Beams | None:
    if width is None:
        if length_penalty is not None:
            raise ConfigError("--length-penalty ranks what a search finds; add --beams")
        return None
    from lmtrain.inference.beam import Beams

    return Beams(width, length_penalty or 0.0)


def _row(result: Generation, probabilities: bool) -> dict[str, Any]:
    """A generation as JSON."""
    row = {**vars(result)}
    tokens = row.pop("tokens")
    if not math.isfinite(result.log_probability):
        row["log_probability"] = None
    if probabilities:
        row["tokens"] = [{"text": token, "probability": math.exp(value)} for token, value in tokens]
    return row


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
        text = decode_utf8(data, f"--prompts {source}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
