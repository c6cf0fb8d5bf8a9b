"""Prompts become token ids, and the ids that a model writes become text."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmtrain.data.text.normalise import normalise
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import DataError
from lmtrain.model.objectives import Direction


@dataclass(frozen=True)
class PromptCodec:
    """Encodes a prompt for the model, and decodes what the model writes.

    Args:
        stream: the model was trained on one long text: it starts from `<eos>`, and an end token stands for a newline.
        direction: with backward the model writes what comes before the prompt, last token first, until `<bos>`.
    """

    tokenizer: Tokenizer
    stream: bool = False
    direction: Direction = "forward"

    @property
    def end(self) -> int | None:
        """The token that ends a text; a stream has none."""
        if self.stream:
            return None
        return self.tokenizer.eos_id if self.direction == "forward" else self.tokenizer.bos_id

    @property
    def start(self) -> int:
        """The token that the model reads first."""
        return self.tokenizer.bos_id if self.direction == "forward" and not self.stream else self.tokenizer.eos_id

    @property
    def excluded_ids(self) -> list[int]:
        """Tokens that the model never writes in this direction: padding and the start of a text."""
        start = self.tokenizer.bos_id if self.direction == "forward" else self.tokenizer.eos_id
        return [self.tokenizer.pad_id, start]

    def encode(self, text: str) -> list[int]:
        """Return a prompt's ids as the model reads them, start token first; raises DataError if it can't be encoded."""
        lines = normalise(text).split("\n") if self.stream else [normalise(text)]
        try:
            first, *others = map(self.tokenizer.encode, lines)
        except DataError as error:
            raise DataError(f"prompt {text[:60]!r}: {error}") from None
        inner = [*first, *(token for line in others for token in (self.tokenizer.eos_id, *line))]
        return [self.start, *(inner if self.direction == "forward" else reversed(inner))]

    def completion(self, text: str, prompt: Sequence[int], written: Sequence[int]) -> str:
        """Decode what the model wrote to a prompt, with the white space that belongs between the two.

        Args:
            text, prompt: the prompt, and its ids as `encode` gives them.
            written: ids in the order in which the model wrote them.
        """
        inner, new = list(prompt[1:]), list(written)
        spaced = self.tokenizer.separator == " "
        if self.direction == "backward":
            after, whole = self._decode(inner[::-1]), self._decode([*inner, *new][::-1])
            completion = whole.removesuffix(after) if whole.endswith(after) else self._decode(new[::-1])
            return completion.removesuffix(" ") if spaced and text[:1].isspace() else completion
        before, whole = self._decode(inner), self._decode(inner + new)
        completion = whole.removeprefix(before) if whole.startswith(before) else self._decode(new)
        return completion.removeprefix(" ") if spaced and text[-1:].isspace() else completion

    def name(self, token: int) -> str:
        """Return the text of one token; a special token has a name in angle brackets."""
        special = {self.tokenizer.eos_id: "<eos>", self.tokenizer.bos_id: "<bos>", self.tokenizer.pad_id: "<pad>"}
        return special.get(token) or self.tokenizer.decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode ids; an end token among them is a newline."""
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == self.tokenizer.eos_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(map(self.tokenizer.decode, lines))
