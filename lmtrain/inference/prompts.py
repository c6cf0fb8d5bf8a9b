"""Prompts become token ids, and the ids that a model writes become text."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmtrain.data.text.normalise import normalise
from lmtrain.data.tokenizers.base import Tokenizer
from lmtrain.errors import DataError
from lmtrain.model.objectives import Direction

WINDOW = 16  # tokens: more than the text of a single token depends on
LONGEST_WINDOW = 512


def end_text_of(separator: str) -> str:
    """Return the text that an end token stands for in a stream whose texts end as `data.separator` says."""
    return {"line": "\n", "paragraph": "\n\n", "file": "\n"}.get(separator, normalise(separator))


@dataclass(frozen=True)
class PromptCodec:
    """Encodes a prompt for the model, and decodes what the model writes.

    Args:
        stream: the model was trained on one long text: it starts from `<eos>`, and end tokens stand within a text.
        end_text: what an end token stands for in a stream, by `data.separator`.
        direction: with backward the model writes what comes before the prompt, last token first, until `<bos>`.
    """

    tokenizer: Tokenizer
    stream: bool = False
    direction: Direction = "forward"
    end_text: str = "\n"

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
        lines = normalise(text).split(self.end_text) if self.stream else [normalise(text)]
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
        before, whole = self.spell(prompt[1:]), self.spell([*prompt[1:], *written])
        completion = whole.removeprefix(before) if whole.startswith(before) else self.spell(written)
        return self.as_written(completion.removeprefix(" ") if self.follows_space(text) else completion)

    def as_written(self, text: str) -> str:
        """Return a text in the order in which the model writes it: with backward its last character comes first. Given
        such a text, it returns the original."""
        return text if self.direction == "forward" else text[::-1]

    def spell(self, ids: Sequence[int]) -> str:
        """Decode ids in the order in which the model writes them; the characters are in that order, too."""
        return self._decode(ids) if self.direction == "forward" else self._decode(ids[::-1])[::-1]

    def follows_space(self, text: str) -> bool:
        """Tell whether a prompt ends in the space that the tokenizer would put between it and its completion."""
        return self.tokenizer.separator == " " and self.as_written(text)[-1:].isspace()

    def name(self, token: int) -> str:
        """Return the text of one token; a special token has a name in angle brackets."""
        special = {self.tokenizer.eos_id: "<eos>", self.tokenizer.bos_id: "<bos>", self.tokenizer.pad_id: "<pad>"}
        return special.get(token) or self.tokenizer.decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode ids; an end token among them is the text that it stands for."""
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == self.tokenizer.eos_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return self.end_text.join(map(self.tokenizer.decode, lines))


class GrowingText:
    """The completion of one prompt, decoded while it is written, at a cost per token that does not grow with the text.

    Only the last tokens are decoded anew for each token, since only the end of a text depends on what follows it:
    bytes become a character, a word gets a space before it.

    Args:
        codec, text, prompt: the prompt, and its ids as `codec.encode` gives them.
    """

    def __init__(self, codec: PromptCodec, text: str, prompt: Sequence[int]) -> None:
        self.codec = codec
        self.characters: list[str] = []  # of `codec.as_written(codec.completion(...))`
        self.changed = 0  # index of the first character that the last token has added or changed
        self._after_space = codec.follows_space(text)
        self._ids = list(prompt[1:])  # the last tokens, in the order in which they are read and written
        self._prompt_count = len(self._ids)  # how many of these belong to the prompt
        self._decoded = codec.spell(self._ids)
        self._waiting = 0  # tokens that are not decoded yet
        self._shorten()

    def append(self, token: int) -> None:
        """Take the next token that the model has written."""
        self._ids.append(token)
        self._waiting += 1
        self.changed = len(self.characters)
        if self._waiting * LONGEST_WINDOW < len(self._ids):  # a long run of tokens that only together are text
            return
        decoded = self.codec.spell(self._ids)
        pairs = enumerate(zip(self._decoded, decoded, strict=False))
        same = next((at for at, (old, new) in pairs if old != new), min(len(self._decoded), len(decoded)))
        self.changed -= len(self._decoded) - same
        if self.changed < 0:  # the prompt's own text would change: the completion is decoded by itself
            self._ids, self._prompt_count = self._ids[self._prompt_count :], 0
            decoded, same, self.changed = self.codec.spell(self._ids), 0, 0
        added = decoded[same:]
        self.characters[self.changed :] = added.removeprefix(" ") if self._after_space and not self.changed else added
        self._decoded, self._waiting = decoded, 0
        if len(self._ids) > 2 * WINDOW:
            self._shorten()

    def _shorten(self) -> None:
        """Keep the last tokens only, unless their text depends on those before them: a byte in a run of bytes."""
        ids = self._ids[-WINDOW:]
        decoded = self.codec.spell(ids)
        if decoded and self._decoded.endswith(decoded[len(decoded) // 2 :]):
            self._prompt_count = max(0, self._prompt_count - (len(self._ids) - len(ids)))
            self._ids, self._decoded = ids, decoded
