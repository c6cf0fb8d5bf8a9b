"""Which field of a record, or column of a table, holds the text."""

from collections.abc import Sequence

from lmtrain.data.text.normalise import normalise
from lmtrain.errors import DataError

DEFAULT_FIELD = "text"
USUAL_NAMES = ("text", "content", "sentence", "document", "review")
SHOWN = 8


def choose_field(wanted: str, names: Sequence[str], with_text: Sequence[str]) -> str:
    """Return the name of the field that holds the text.

    Args:
        wanted: `data.field`. Where there is no field named text, its default, another one with a usual name is taken,
            or the only one that holds text.
        names: all fields there are.
        with_text: those of them that hold text.

    Raises:
        DataError: there is no such field, or it is not clear which one is meant; the message lists what there is.
    """
    composed = {normalise(name): name for name in reversed(names)}
    if normalise(wanted) in composed:
        return composed[normalise(wanted)]
    if wanted != DEFAULT_FIELD:
        raise DataError(f"no field {wanted!r} (set data.field); it has {list_names(names)}")
    by_name = {name.strip().lower(): name for name in reversed(names)}
    usual = next((by_name[name] for name in USUAL_NAMES if name in by_name), None)
    if usual is not None:
        return usual
    if len(with_text) == 1:
        return with_text[0]
    if not with_text:
        raise DataError(f"no field holds text (data.field); it has {list_names(names)}")
    raise DataError(f"which field is the text? Set data.field to one of {list_names(with_text)}")


def list_names(names: Sequence[str]) -> str:
    """Return names for a message, the first eight of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(repr(str(name)[:40]) for name in names[:SHOWN]) or "none") + more
