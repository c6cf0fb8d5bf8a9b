"""Files of tensors in the safetensors format, written and read piece by piece, so neither needs a whole file in memory.

Such a file begins with the length of its header in eight bytes. The header is JSON, and says of each tensor its type,
its shape and where it lies in the rest of the file: https://huggingface.co/docs/safetensors. The safetensors library
writes the same bytes, but takes every tensor to the CPU first, and it maps a file into memory, whose bytes may change
after they were hashed. Here each byte that is used was hashed on its way.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from lmtrain.errors import ArtefactError
from lmtrain.system.files import LARGEST_JSON_BYTES, LARGEST_TEXT_BYTES, hash_of, open_regular, parse_json, read_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE_BYTES = 8 << 20  # a multiple of the size of every type
MOST_DIMENSIONS = 64  # PyTorch's own bound
# name of each type in a file -> its name in PyTorch, and its bytes; a file holds the last of them first
TYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "F16": ("float16", 2),
    "BF16": ("bfloat16", 2), "I32": ("int32", 4), "F32": ("float32", 4), "F64": ("float64", 8), "I64": ("int64", 8),
}  # fmt: skip


class TensorSpec(NamedTuple):
    """The type and shape of a tensor, from the header of a file."""

    dtype: str  # as safetensors writes it: F32
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Return the type and shape of a tensor in memory."""
        name = str(tensor.dtype).removeprefix("torch.")
        return cls(next(dtype for dtype, (known, _) in TYPES.items() if known == name), tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def size_bytes(self) -> int:
        """The bytes of the tensor in a file."""
        return TYPES[self.dtype][1] * prod(self.shape)

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """Return a tensor of this type and shape, whose values are not set yet."""
        import torch

        dtype: torch.dtype = getattr(torch, TYPES[self.dtype][0])
        return torch.empty(self.shape, dtype=dtype, device=device)


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the type and shape of each tensor, in the order in which a file holds them: wide types first, so that each
    tensor is aligned, and equal types by name."""
    order = list(TYPES)
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return dict(sorted(specs.items(), key=lambda each: (-order.index(each[1].dtype), each[0])))


def header_of(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the first bytes of the file that holds these tensors, in this order."""
    header, end = {}, 0
    for name, spec in specs.items():
        begin, end = end, end + spec.size_bytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def pieces_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the file that holds these tensors. A tensor on a device comes to the
    CPU a piece at a time."""
    import torch

    specs = in_file_order(tensors)
    yield header_of(specs)
    for name in specs:
        flat = tensors[name].detach().flatten()
        for piece in flat.split(PIECE_BYTES // flat.element_size()):
            yield memoryview(piece.cpu().view(torch.uint8).numpy())


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the file that holds these tensors."""
    specs = in_file_order(tensors)
    return len(header_of(specs)) + sum(spec.size_bytes for spec in specs.values())


def read_header(path: Path, handle: IO[bytes], size: int) -> dict[str, TensorSpec]:
    """Read the type and shape of each tensor from the header of an open safetensors file of `size` bytes, in the order
    in which the file holds them. Anything else raises ArtefactError."""
    return _parse_header(path, _header_bytes(path, handle, size))


def _header_bytes(path: Path, handle: IO[bytes], size: int) -> bytes:
    start = handle.read(8)
    if (length := int.from_bytes(start, "little")) > min(size, LARGEST_JSON_BYTES):
        raise ArtefactError(f"{path}: not a safetensors file")
    return start + handle.read(length)


def _parse_header(path: Path, data: bytes) -> dict[str, TensorSpec]:
    header = parse_json(path, data[8:])
    header.pop("__metadata__", None)
    specs, end = {}, 0
    try:
        offsets = {name: tuple(map(operator.index, entry["data_offsets"])) for name, entry in header.items()}
        for name in sorted(offsets, key=offsets.__getitem__):
            spec = TensorSpec(header[name]["dtype"], tuple(map(operator.index, header[name]["shape"])))
            if len(spec.shape) > MOST_DIMENSIONS or min(spec.shape, default=0) < 0:
                raise ValueError
            begin, end = end, end + spec.size_bytes
            if offsets[name] != (begin, end):  # there is a gap, or two tensors overlap
                raise ValueError
            specs[name] = spec
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{path}: not a safetensors file") from None
    return specs


class SavedFile(NamedTuple):
    """A file of a checkpoint: what the manifest and, for tensors, its own header say of it. No tensor is read yet."""

    path: Path
    size: int
    sha256: str
    specs: dict[str, TensorSpec]  # of the tensors, in the order of the file; empty for another file

    def read_json(self) -> dict[str, Any]:
        """Return the JSON object in the file; raises ArtefactError if a byte is not as it was saved."""
        data = read_bytes(self.path, min(self.size, LARGEST_TEXT_BYTES))
        if hash_of(data) != self.sha256:
            raise self._damaged()
        return parse_json(self.path, data)

    def read_tensors(self, into: Mapping[str, Tensor], finite: str | None = None) -> None:
        """Copy the tensors of the file into those of the same names, and check the whole file on the way.

        The bytes that are copied are the bytes that are hashed, so a file that changes while it is read is noticed. But
        it is noticed only at the end of the file: after an error the tensors of `into` must not be used.

        Args:
            into: tensors of the shapes and types of `specs`; those of the file that it does not name are only checked.
            finite: tensors whose name begins with this must hold no infinity and no NaN; None: any may.

        Raises:
            ArtefactError: a byte is not as it was saved, or a value is not finite.
        """
        odd = None
        for name, first, values in self._pieces():
            if name in into:
                into[name].detach().view(-1)[first : first + len(values)].copy_(values)
            if finite is not None and name.startswith(finite) and odd is None and not bool(values.isfinite().all()):
                odd = name
        if odd is not None:
            raise ArtefactError(f"{self.path}: tensor {odd!r} holds values that are not finite")

    def _pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the tensors in pieces: the tensor's name, the index of the piece's first value, and the values (W,)."""
        import torch

        buffer = memoryview(bytearray(min(PIECE_BYTES, self.size)))
        with open_regular(self.path) as handle:
            header = _header_bytes(self.path, handle, self.size)
            if list(_parse_header(self.path, header).items()) != list(self.specs.items()):
                raise self._damaged()  # it is another file than the one whose header was checked
            digest = hashlib.sha256(header)
            for name, spec in self.specs.items():
                dtype, width = TYPES[spec.dtype]
                for start in range(0, spec.size_bytes, PIECE_BYTES):
                    piece = buffer[: min(PIECE_BYTES, spec.size_bytes - start)]
                    if handle.readinto(piece) < len(piece):  # type: ignore[attr-defined]
                        raise self._damaged()
                    digest.update(piece)
                    yield name, start // width, torch.frombuffer(piece, dtype=getattr(torch, dtype))
            if handle.read(1) or digest.hexdigest() != self.sha256:
                raise self._damaged()

    def _damaged(self) -> ArtefactError:
        return ArtefactError(f"{self.path}: damaged: not the bytes that were saved")


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file, by name; raises ArtefactError if it is not such a file."""
    import safetensors.torch

    try:
        return dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: not a safetensors file: {str(error)[:100]}") from None
