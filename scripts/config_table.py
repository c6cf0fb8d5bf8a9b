"""Write the table of config keys, made from the schema, into configs/README.md; `--check` only compares the two."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtrain.config.schema import Config, Section

README = Path(__file__).resolve().parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- config table: python scripts/config_table.py -->", "<!-- end of config table -->"


def rows(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type and bounds, default, meaning) of every key below a section."""
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from rows(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        if prefix + name == "name":
            default = "null"
        yield prefix + name, kind(properties[name]), default, (field.description or "").replace("\n", " ")


def kind(schema: dict[str, Any]) -> str:
    """Return a key's type and bounds in a few words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(option) for option in schema["anyOf"]))
    if schema.get("type") == "null":
        return "null"
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        names = {"number": "list of numbers", "integer": "list of whole numbers"}
        return names.get(schema["items"].get("type"), "list of texts")
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    words = names.get(schema["type"], schema["type"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema and abs(schema[key]) < 10**4]
    return " ".join([words, *bounds])


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, what, default, meaning in rows(Config):
        lines.append(f"| `{key}` | {what} | {default if default == 'required' else f'`{default}`'} | {meaning} |")
    return "\n".join(lines)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    current = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if "--check" not in sys.argv:
        README.write_text(current, encoding="utf-8")
    elif text != current:
        print("configs/README.md: its table of keys is out of date; run scripts/config_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
