"""A new folder with an exported model in it, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import ConfigError, StorageError
from lmtrain.inference.export.int8 import compare, quantised
from lmtrain.inference.export.onnx import onnx_model
from lmtrain.inference.export.weights import torch_weights
from lmtrain.model.language_model import LanguageModel
from lmtrain.system.files import reason_of, space_note, write_synced


def export_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    format: Literal["onnx", "safetensors"],
    int8: bool,
    rows: Iterable[list[int]] = (),
) -> list[str]:
    """Write a model and its tokenizer into a new folder; returns lines that say what was written.

    Args:
        format: onnx, see `onnx_model`; safetensors, see `torch_weights`.
        int8: with onnx: store weights in 8 bits.
        rows: ids of some texts, on which the model in 8 bits is compared with the model as it is.

    Raises:
        ConfigError: the folder is there already, a package is missing, or the model has no such form.
        StorageError: the folder can't be written.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path}: is there already; name a new folder")
    if format == "safetensors":
        from safetensors.torch import save

        if int8:
            raise ConfigError("int8 is for onnx; safetensors holds the weights as they are")
        tensors = torch_weights(model)
        write_folder(path, tokenizer, {"model.safetensors": save(tensors)})
        return [f"{path}/model.safetensors: {len(tensors)} tensors"]
    content = onnx_model(model, tokenizer).SerializeToString()
    told: list[str] = []
    if int8:
        with tempfile.TemporaryDirectory(prefix="lmtrain-") as scratch:
            untied = onnx_model(model, tokenizer, tied=False)  # each product has 8 bits of its own
            small = quantised(untied.SerializeToString(), Path(scratch))
        told, content = compare(content, small, list(rows)), small
    write_folder(path, tokenizer, {"model.onnx": content})
    return [f"{path}/model.onnx: {len(content) / 1e6:.1f} MB", *told]


def write_folder(path: Path, tokenizer: Tokenizer, files: dict[str, bytes]) -> None:
    """A new folder with these files and the tokenizer, all of them or none.

    Raises:
        ConfigError: the folder is there already.
        StorageError: no room, or another fault of the file system.
    """
    if path.exists():
        raise ConfigError(f"{path}: is there already; name a new folder")
    contents = files | {"tokenizer.json": tokenizer.dumps().encode()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        beside.mkdir()
        for name, content in contents.items():
            write_synced(beside / name, content)
        beside.rename(path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        size = sum(map(len, contents.values()))
        raise StorageError(f"{path}: can't be written: {reason_of(error)}{space_note(path.parent, size)}") from None
