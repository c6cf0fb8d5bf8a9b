"""JSON lines: every line is a JSON object, and one of its fields holds a text."""

import json

from lmtrain.data.text.formats.base import Format
from lmtrain.data.text.formats.text import TextFormat
from lmtrain.data.text.normalise import normalise
from lmtrain.data.text.reading import Block, RawBlock
from lmtrain.errors import DataError


class JsonlFormat(Format):
    """Every line is a JSON object whose field `field` is a text; a blank line is an empty text."""

    suffixes = (".jsonl",)
    lines_are_records = True

    def parse(self, raw: RawBlock) -> Block:
        block = TextFormat(self.field).parse(raw)
        texts = []
        for number, line in zip(block.lines, block.texts, strict=True):
            try:
                texts.append(self._text(line) if line.strip() else "")
            except DataError as error:
                raise DataError(f"{block.path}:{number}{error}") from None
        return block._replace(texts=texts, ended=True)

    def _text(self, line: str) -> str:
        """Return the text of a record; raises DataError with what follows the number of the line."""
        try:
            record = json.loads(line)
            text = record[self.field]
            if not isinstance(text, str):
                raise TypeError
        except json.JSONDecodeError as error:
            raise DataError(f":{error.colno}: not JSON: {error.msg}") from None
        except KeyError:
            names = ", ".join(map(repr, list(record)[:5]))
            raise DataError(f": no field {self.field!r} (set data.field); it has {names}") from None
        except (TypeError, RecursionError, ValueError):
            raise DataError(f": not an object whose field {self.field!r} is text") from None
        if "\0" in text:
            raise DataError(f": a NUL character in field {self.field!r}")
        return normalise(text.encode("utf-8", "replace").decode())  # \u escapes may hold half a surrogate pair
