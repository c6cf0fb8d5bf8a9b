"""`lmtrain check RUN`: what a run directory holds, and whether every part of it is whole."""

import json
from collections.abc import Iterator
from pathlib import Path

from lmtrain.errors import ArtefactError
from lmtrain.runs import checkpoint
from lmtrain.runs.directory import RunDirectory
from lmtrain.runs.ngram_counts import COUNTS_FILE, read_counts
from lmtrain.runs.weights import count_weights
from lmtrain.training.state import open_checkpoint
from lmtrain.training.tracking import METRICS


def inspect_run(run: RunDirectory) -> Iterator[str]:
    """Yield a line on every part, as a resume would find it: hashes, seals, formats, shapes, numbers.

    Raises:
        ArtefactError: at the end, with every fault that was found.
    """
    config, tokenizer = run.config_and_tokenizer()
    count, vocab_size = count_weights(config, tokenizer.vocab_size), tokenizer.vocab_size
    yield f"{run.path}: {count:,} weights, vocabulary {vocab_size:,} ({tokenizer.kind})"
    faults: list[str] = []
    whole: list[int] = []
    rows = 0
    homes = {step: checkpoint.directory_of(run.checkpoints, step) for step in checkpoint.steps(run.checkpoints)}
    for step, home in homes.items():
        try:
            saved = open_checkpoint(run, config, tokenizer, step)
            saved.read_tensors({})
        except ArtefactError as error:
            if home.exists():  # else a training that still runs here has removed it
                faults.extend(error.faults)
            continue
        size = sum(file.size for file in saved.files.values())
        where = "finished" if saved.state.finished else f"epoch {saved.state.epoch + 1}"
        if config.model.ngram_counts is not None and not whole:
            try:
                read_counts(run.path / COUNTS_FILE, saved.counts, config, tokenizer)
                yield f"{COUNTS_FILE}: whole, {(run.path / COUNTS_FILE).stat().st_size:,} bytes"
            except ArtefactError as error:
                faults.extend(error.faults)
        yield f"{home.name}: whole, {size:,} bytes, {where}"
        whole.append(step)
        rows = max(rows, saved.lengths.get(METRICS, 0))
    for left in sorted({*run.checkpoints.glob(".step-*")} - {*homes.values()}):
        yield f"{left.name}: left by a save or a removal that was interrupted; a resume removes it"
    faults += _metrics(run.path / METRICS, rows)
    best = run.read_pointer("best")
    used = next((step for step in run.candidates() if step in whole), None)
    if whole:
        yield f"lmtrain train --resume continues from step {whole[0]}"
        yield f"lmtrain generate takes step {used}{' (the best)' if used == best else ''}"
    else:
        yield "no checkpoint yet; lmtrain train --resume starts afresh" if not faults else "no checkpoint is whole"
    if faults:
        raise ArtefactError(*faults)


def _metrics(path: Path, most: int) -> Iterator[str]:
    """Yield what is wrong with the rows that the newest checkpoint counts on. A resume cuts off later ones.

    Args:
        most: bytes of the file at the newest checkpoint.
    """
    if not path.exists():
        if most:
            yield f"{path}: missing"
        return
    if path.stat().st_size < most:
        yield f"{path}: shorter than it was at the newest checkpoint: rows are missing"
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if (most := most - len(line)) < 0:
                return
            try:
                json.loads(line)
            except ValueError:
                yield f"{path}:{number}: not a row of JSON"
                return
