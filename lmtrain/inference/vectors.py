"""Lines become vectors: the hidden states of the recurrent layers after each token and at the end of each line.

Shapes: D directions, H hidden size, T tokens of all lines of a block.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.data.arrays import Ints
from lmtrain.data.batches.rows import gather_batch, sorted_parts
from lmtrain.data.text.reading import Block
from lmtrain.data.tokenizers.framing import encode_block, frame_texts
from lmtrain.errors import ConfigError, StorageError
from lmtrain.inference.options import check_new
from lmtrain.inference.prompts import PromptCodec
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.objectives import Direction
from lmtrain.model.packing import pack_rows
from lmtrain.system.files import reason_of

READ_TOKENS = 8192  # padded tokens per batch

Floats = NDArray[np.float32]


class Vectors(NamedTuple):
    """The vectors of a block of lines; `save_vectors` writes the blocks one after the other."""

    ids: Ints  # (T,) token ids
    lengths: Ints  # (lines,) tokens of each line
    output: Floats  # (T, D*H) the last layer's state after each token, forward beside backward
    h_n: Floats  # (lines, num_layers*D, H) after the last token in reading order: by layer, forward before backward


@torch.inference_mode()
def embed(model: LanguageModel, codec: PromptCodec, blocks: Iterable[Block]) -> Iterator[Vectors]:
    """Compute the vectors of every line, a block at a time.

    The forward stack reads `<bos> t1 .. tn`, the backward one `<eos> tn .. t1`, as in training. For one line
    output[-1, :H] therefore equals h_n of the last forward layer, and output[0, H:] that of the last backward layer.
    """
    if len(set(sizes := model.recurrence.hidden_sizes)) > 1:
        raise ConfigError(f"layers of the sizes {list(sizes)} have no h_n of one shape; use a run of equal layers")
    tokenizer = codec.tokenizer
    starts: dict[Direction, int] = {"forward": codec.start}
    if model.bidirectional:
        starts["backward"] = tokenizer.eos_id
    for block in blocks:
        flat, lengths, *_ = encode_block(tokenizer, block)
        position = np.arange(len(flat)) - np.repeat(lengths.cumsum() - lengths, lengths)  # (T,) within its line
        mirrored = np.repeat(lengths.cumsum(), lengths) - 1 - position  # (T,) each line's tokens, last one first
        outputs, ends = [], []
        for direction, start in starts.items():
            ids = flat if direction == "forward" else flat[mirrored]
            output, end = _read(model, direction, ids, lengths, start, tokenizer.pad_id)
            outputs.append(output if direction == "forward" else output[mirrored])
            ends.append(end)
        h_n = np.stack(ends, 2).reshape(len(lengths), -1, ends[0].shape[2])  # (lines, layers, D, H) first
        yield Vectors(flat, lengths, np.concatenate(outputs, 1), h_n)


def _read(
    model: LanguageModel, direction: Direction, flat: Ints, lengths: Ints, start: int, pad_id: int
) -> tuple[Floats, Floats]:
    """Run one stack over ids `flat` (T,), those of each line in the stack's reading order. Returns the states of the
    last layer after each token (T, H), and of all layers at the end of each line (lines, layers, H)."""
    device, stack = model.embedding.weight.device, model.stack(direction)
    framed, ends = frame_texts(flat, lengths, pad_id, start)  # the token after a line is not read
    begins, size = ends - lengths - 2, model.recurrence.hidden_sizes[-1]
    output = np.empty((len(framed), size), np.float32)
    last = np.empty((len(lengths), len(stack.hidden_sizes), size), np.float32)
    for lines in sorted_parts(lengths + 1, READ_TOKENS):
        batch = gather_batch(framed, begins[lines], lengths[lines] + 1, pad_id)
        rows = pack_rows(batch.lengths)
        lines = lines[batch.order.numpy()]
        tokens = batch.tokens[rows.time, rows.row].to(device)
        states, state = stack(model.embedding(tokens), rows.to(device))
        output[begins[lines][rows.row.numpy()] + rows.time.numpy()] = states.float().cpu().numpy()
        last[lines] = torch.stack([layer[0] for layer in state], 1).float().cpu().numpy()
    inner = np.ones(len(framed), bool)
    inner[begins], inner[ends - 1] = False, False
    return output[inner], last


def save_vectors(path: str | Path, blocks: Iterable[Vectors]) -> int:
    """Write the vectors of all lines to a new .npz file, in memory that does not grow with them; returns their number.

    Raises StorageError if the file can not be written; nothing of it is left then.
    """
    target = Path(path)
    check_new(target, "file")
    try:
        handle = open(target, "xb")  # noqa: SIM115  # before the work begins, not after
    except FileExistsError:  # another process was quicker
        check_new(target, "file")
        raise
    try:
        with handle, tempfile.TemporaryDirectory(prefix="lmtrain-", dir=target.parent) as scratch:
            return _write(handle, Path(scratch), blocks)
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(f"{target}: can't be written: {reason_of(error)}") from None
        raise


def _write(target: IO[bytes], scratch: Path, blocks: Iterable[Vectors]) -> int:
    """Write each member to a file of its own first, since its header needs its length, and then all to one archive."""
    kinds: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}
    counts = dict.fromkeys(Vectors._fields, 0)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(open(scratch / name, "wb")) for name in Vectors._fields}
        for vectors in blocks:
            for name, values in vectors._asdict().items():
                parts[name].write(np.ascontiguousarray(values).data)
                kinds[name], counts[name] = (values.dtype, values.shape[1:]), counts[name] + len(values)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, (dtype, shape) in kinds.items():
            header = {"descr": dtype.str, "fortran_order": False, "shape": (counts[name], *shape)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member, open(scratch / name, "rb") as content:
                np.lib.format.write_array_header_2_0(member, header)
                shutil.copyfileobj(content, member)
    return counts["lengths"]
