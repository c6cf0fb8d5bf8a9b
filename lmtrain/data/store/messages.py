"""Messages between this process and its workers: a JSON object and bytes, each with its size before it."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import IO, Any

from lmtrain.data.store.encoding import BlockResult

_SIZES = struct.Struct("<QQ")


def send(stream: IO[bytes], header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """Write a message; raises OSError where nobody reads any more."""
    head = json.dumps({**header, "sizes": list(map(len, parts))}).encode()
    stream.write(_SIZES.pack(len(head), sum(map(len, parts))) + head)
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> BlockResult | None:
    """Read a message; None where the other side has ended."""
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    head_size, body_size = _SIZES.unpack(sizes)
    head = stream.read(head_size)
    if len(head) < head_size:
        return None
    header = json.loads(head)
    parts = [stream.read(size) for size in header.pop("sizes")]
    return BlockResult(header, parts) if sum(map(len, parts)) == body_size else None
