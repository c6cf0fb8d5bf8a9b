"""Writes an exported model into a new folder, completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import StorageError
from lmtrain.inference.export.int8 import compare, quantised
from lmtrain.inference.export.onnx import onnx_model
from lmtrain.inference.export.weights import torch_weights
from lmtrain.inference.options import check_export, check_new
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.files import move, reason_of, space_note, write_synced


def export_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    format: Literal["onnx", "safetensors"],
    int8: bool,
    rows: Iterable[list[int]],
) -> list[str]:
    """Write a model and its tokenizer into a new folder; returns lines that say what was written.

    `rows` are ids of some texts, on which a model in 8 bits is compared with the original; see `TrainedModel.export`.
    """
    check_export(path, format, int8)
    if format == "safetensors":
        from safetensors.torch import save

        tensors = torch_weights(model)
        _write_folder(path, tokenizer, {"model.safetensors": save(tensors)})
        return [f"{path}/model.safetensors: {len(tensors)} tensors"]
    content = onnx_model(model, tokenizer).SerializeToString()
    comparison: list[str] = []
    if int8:
        with tempfile.TemporaryDirectory(prefix="lmtrain-") as scratch:
            untied = onnx_model(model, tokenizer, tied=False)  # each of the two products gets 8-bit weights of its own
            small = quantised(untied.SerializeToString(), Path(scratch))
        comparison, content = compare(content, small, list(rows)), small
    _write_folder(path, tokenizer, {"model.onnx": content})
    return [f"{path}/model.onnx: {len(content) / 1e6:.1f} MB", *comparison]


def _write_folder(path: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """Write a new folder with these files and the tokenizer: all of them or none."""
    check_new(path, "folder")  # again: the export may have taken minutes
    contents = files | {"tokenizer.json": tokenizer.dumps().encode()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        unfinished.mkdir()
        for name, content in contents.items():
            write_synced(unfinished / name, content)
        move(unfinished, path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        size = sum(map(len, contents.values()))
        raise StorageError(f"{path}: can't be written: {reason_of(error)}{space_note(path.parent, size)}") from None
