"""Parquet files: one column of strings holds the texts. It needs pyarrow, the extra `lmtrain[parquet]`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.fields import choose_field, list_names
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import BLOCK_BYTES, Block, RawBlock, open_text, open_unchanged
from lmtrain.errors import DataError

MOST_ROWS = 1 << 16  # of a block


class ParquetFormat(Format):
    """Each value of a column of strings is a text; a null is an empty text. Places are rows, counted from 1.

    A block's `offset` and `end` count rows, and its data are the values with a NUL between them.
    """

    def header(self, path: str) -> str:
        """Return the names of the columns, the one with the texts first."""
        with open_text(path) as handle, _opened(path, handle) as file:
            schema = file.schema_arrow
            with_text = [field.name for field in schema if _is_text(field.type)]
            try:
                column = choose_field(self.keys.field, schema.names, with_text)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            if column not in with_text:
                raise DataError(f"{path}: column {column!r} holds {schema.field(column).type}, not text")
        return json.dumps([column, *schema.names])

    def details(self, header: str) -> str:
        column, *names = json.loads(header)
        return f"column {column!r} of {list_names(names)}"

    def raw_blocks(self, path: str, offset: int = 0, line: int = 1) -> Iterator[RawBlock]:
        header = self.header(path)
        column, size = json.loads(header)[0], os.path.getsize(path)
        with open_unchanged(path) as handle, _opened(path, handle) as file:
            skipped, total, row = offset, max(1, file.metadata.num_rows), offset
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skipped >= rows:
                    skipped -= rows
                    continue
                for values in _batches(file, group, column):
                    first, skipped = min(skipped, len(values)), max(0, skipped - len(values))
                    if not (count := len(values) - first):
                        continue
                    data = _join(values.slice(first))
                    if data.count(0) > count - 1:
                        place = next(at for at, text in enumerate(values.slice(first).to_pylist()) if "\0" in text)
                        raise DataError(f"{path}:{row + place + 1}: a NUL character in column {column!r}")
                    end, read_bytes = row + count, size * (row + count) // total
                    yield RawBlock(path, row + 1, row, data, end, end + 1, read_bytes=read_bytes, header=header)
                    row = end

    def parse(self, raw: RawBlock) -> Block:
        try:
            text = normalise(raw.data.decode())
        except UnicodeDecodeError as error:
            row = raw.first_line + raw.data.count(0, 0, error.start)
            fault = f"{raw.path}:{row}: not UTF-8 (byte 0x{raw.data[error.start]:02x})"
            raise DataError(f"{fault} in column {json.loads(raw.header)[0]!r}") from None
        texts = text.split("\0")
        if "\n" in text:
            texts = [text.strip("\n") for text in texts]
        return Block(raw.path, range(raw.first_line, raw.first_line + len(texts)), texts)


def _batches(file: Any, group: int, column: str) -> Iterator[Any]:
    """Read a column of a row group as arrays of strings of about a block; a null becomes an empty string."""
    import pyarrow

    facts = file.metadata.row_group(group)
    sizes = {facts.column(place).path_in_schema: facts.column(place) for place in range(facts.num_columns)}
    per_row = max(1, sizes[column].total_uncompressed_size // max(1, facts.num_rows))
    rows = min(MOST_ROWS, max(1, BLOCK_BYTES // per_row))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0).cast(pyarrow.string())
        yield values.fill_null("") if values.null_count else values


def _join(values: Any) -> bytes:
    """Return the UTF-8 of strings with a NUL between them, without making Python's strings of them."""
    import pyarrow
    import pyarrow.compute

    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)
    return bytes(pyarrow.compute.binary_join(lists, "\0")[0].as_buffer())


@contextmanager
def _opened(path: str, handle: Any) -> Iterator[Any]:
    """Open a Parquet file; raises DataError if it is none, is broken, or pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f'{path}: Parquet needs pyarrow: pip install "lmtrain[parquet]"') from None
    try:
        yield parquet.ParquetFile(handle, pre_buffer=False, buffer_size=BLOCK_BYTES)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise DataError(f"{path}: broken Parquet file: {str(error).splitlines()[0][:200]}") from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
