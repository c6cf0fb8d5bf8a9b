"""Text to what a model reads first, and what it has written back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmtrain.data.text.normalise import normalise
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import DataError
from lmtrain.model.objectives import Direction


@dataclass(frozen=True)
class PromptCodec:
    """How a model's tokens stand for text.

    Args:
        stream: the model has learnt one long text: it starts from `<eos>`, and an end token is a newline.
        direction: backward: it writes what comes before, last token first, until `<bos>`.
    """

    tokenizer: Tokenizer
    stream: bool = False
    direction: Direction = "forward"

    @property
    def end(self) -> int | None:
        """The token at which a text ends; a stream has none."""
        if self.stream:
            return None
        return self.tokenizer.eos_id if self.direction == "forward" else self.tokenizer.bos_id

    @property
    def start(self) -> int:
        """The token that is read first."""
        return self.tokenizer.bos_id if self.direction == "forward" and not self.stream else self.tokenizer.eos_id

    @property
    def never(self) -> list[int]:
        """Tokens that never follow in this direction."""
        start = self.tokenizer.bos_id if self.direction == "forward" else self.tokenizer.eos_id
        return [self.tokenizer.pad_id, start]

    def encode(self, text: str) -> list[int]:
        """A prompt as the model reads it, its start token first; raises DataError where it is none."""
        lines = normalise(text).split("\n") if self.stream else [normalise(text)]
        try:
            first, *lines_after = map(self.tokenizer.encode, lines)
        except DataError as error:
            raise DataError(f"prompt {text[:60]!r}: {error}") from None
        inner = [*first, *(token for line in lines_after for token in (self.tokenizer.eos_id, *line))]
        return [self.start, *(inner if self.direction == "forward" else reversed(inner))]

    def completion(self, text: str, prompt: Sequence[int], written: Sequence[int]) -> str:
        """The text of what was written to a prompt, with the white space that belongs between the two.

        Args:
            text, prompt: the prompt, and what `encode` made of it.
            written: tokens in the order in which they were written.
        """
        inner, own = list(prompt[1:]), list(written)
        spaced = self.tokenizer.separator == " "
        if self.direction == "backward":
            behind, whole = self._decode(inner[::-1]), self._decode([*inner, *own][::-1])
            found = whole.removesuffix(behind) if whole.endswith(behind) else self._decode(own[::-1])
            return found.removesuffix(" ") if spaced and text[:1].isspace() else found
        before, whole = self._decode(inner), self._decode(inner + own)
        found = whole.removeprefix(before) if whole.startswith(before) else self._decode(own)
        return found.removeprefix(" ") if spaced and text[-1:].isspace() else found

    def name(self, token: int) -> str:
        """The text of one token, a special one by its name."""
        special = {self.tokenizer.eos_id: "<eos>", self.tokenizer.bos_id: "<bos>", self.tokenizer.pad_id: "<pad>"}
        return special.get(token) or self.tokenizer.decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of ids, an end token among them being a newline."""
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == self.tokenizer.eos_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(map(self.tokenizer.decode, lines))
