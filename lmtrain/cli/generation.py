"""`lmtrain generate`: a trained run writes text."""

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
from lmtrain.data.text.kinds import SUFFIXES
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.source import Source
from lmtrain.data.text.unpacking import inner_suffix
from lmtrain.errors import ConfigError, escape
from lmtrain.inference.options import Beams, Sampling, check_generation
from lmtrain.system.console import decode_utf8, say

if TYPE_CHECKING:
    from lmtrain.inference.generation import Generation

LARGEST_PROMPTS_BYTES = 64 << 20


def generate(
    run: RunArgument = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; repeatable.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="Prompts, one a line; of a .jsonl, .csv ... its texts.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=1 << 31, help="Largest number of tokens to write to each prompt.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw at random: below 1 safer, above 1 more varied; 0 is greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable tokens that together hold this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of at least this fraction of the best one's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that the text holds already become less probable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same texts; default 0.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Texts to each prompt, drawn or found by --beams.")] = 1,
    beams: Annotated[int | None, typer.Option(help="Search for the most probable text with N hypotheses.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With --beams: rank by log-probability / tokens ** this; default 0.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Write what comes before the prompt (runs of two directions).")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    show_probabilities: Annotated[
        bool, typer.Option("--show-probabilities", help="Print every written token with its probability.")
    ] = False,
    as_json: JsonOption = False,
    raw: RawOption = False,
    device: DeviceOption = None,
) -> None:
    """Write text until its end token, greedily or drawn at random. Without a prompt the model starts by itself."""
    texts = [*(prompt or []), *(_read_prompts(prompts) if prompts is not None else [])]
    if prompts is not None and not texts:
        raise ConfigError(f"--prompts {prompts}: holds no prompt")
    stops = stop or []
    for name, text in [*(("prompt", text) for text in texts), *(("--stop", text) for text in stops)]:
        check_text(name, text)
    sampling = _sampling(
        repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    if beams is None and length_penalty is not None:
        raise ConfigError("--length-penalty ranks what a search finds; add --beams")
    search = None if beams is None else Beams(beams, length_penalty or 0.0)
    check_generation(sampling, search, count, stops)
    if stream and (len(texts) > 1 or count > 1 or search or backward or as_json or show_probabilities):
        raise ConfigError(
            "--stream prints one text while it is written; leave out other prompts, --count, --beams, --backward, "
            "--json and --show-probabilities"
        )
    model = load_model(run, device)
    for text in texts:
        if unknown := model.unknown_tokens(text):
            say(f"note: prompt {text[:60]!r}: {named(unknown)} unknown to the model, read as <unk>")
    plain = raw or not sys.stdout.isatty()
    if stream:
        start = (texts or [""])[0]
        print(start if plain else escape(start), end="", flush=True)
        for piece in model.stream(start, max_tokens, sampling=sampling, stop=stops):
            print(piece if plain else escape(piece), end="", flush=True)
        print()
        return
    settings: dict[str, Any] = {"sampling": sampling, "beams": search, "count": count, "stop": stops}
    for result in model.generate(texts or [""], max_tokens, **settings, backward=backward):
        if as_json:
            print_json(_row(result, show_probabilities))
            continue
        print(result.text if plain else escape(result.text))
        if show_probabilities:
            for token, log_probability in result.tokens:
                print(f"  {math.exp(log_probability):8.6f}  {escape(repr(token)[1:-1])}")


def _sampling(**options: Any) -> Sampling | None:
    """Return how the given options draw; None if none was given. A penalty alone leaves the text greedy."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return None
    random = sorted(given.keys() - {"repetition_penalty", "temperature"})
    if random and given.get("temperature") == 0:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in random)
        raise ConfigError(f"--temperature 0 draws nothing at random: leave out {names}")
    return Sampling(**({} if random else {"temperature": 0.0}) | given)


def _row(result: Generation, probabilities: bool) -> dict[str, Any]:
    """Return the JSON object of one generated text."""
    row = {**vars(result)}
    tokens = row.pop("tokens")
    if not math.isfinite(result.log_probability):
        row["log_probability"] = None
    if probabilities:
        row["tokens"] = [{"text": token, "probability": math.exp(value)} for token, value in tokens]
    return row


def _read_prompts(source: str) -> list[str]:
    """Read the lines of a file or of standard input, or the texts of a file of records, which may hold line breaks."""
    if SUFFIXES.get(inner_suffix(source), "text") not in ("text", "ids"):
        return list(Source.of([source]).texts())
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
    text = normalise(decode_utf8(data, f"--prompts {source}"))
    return text.removesuffix("\n").split("\n") if text else []
