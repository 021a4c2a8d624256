"""Write docs/configuration.md from the configuration's own schema: every key, its values, its default, its meaning."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_ray.recipes import schema

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Made by scripts/config_page.py from the schema: change the docstrings in opd_ray/config, not this page. -->

Every key of a recipe and of a cluster file. Unknown keys are refused. `opd-ray config RECIPE` prints what a recipe
resolves to, `opd-ray config --schema` the JSON Schema of this page for editors, and `-o key=value` sets one key, with
dots between the parts of its name: `-o cluster.rollout.workers=4`. A `<name>` is one of your own.
"""
Schema = dict[str, Any]


def page() -> str:
    """The whole page as Markdown."""
    whole = schema()
    sections = dict[str, list[str]]()  # name of a definition -> the places where it stands
    _collect(whole, "", whole["$defs"], sections)
    parts = [HEAD, "## A recipe", _table(whole)]
    for name, places in sections.items():
        section = whole["$defs"][name]
        about = _text(section["description"])
        title = ", ".join(f"`{place}`" for place in places)
        if f"## {title}" in parts:  # two kinds of one section
            title += f": {about.partition(':')[0].lower()}"
        parts += [f"## {title}", about, _table(section)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _collect(section: Schema, place: str, known: dict[str, Schema], found: dict[str, list[str]]) -> None:
    """The sections below a section, depth first, each with its places."""
    for key, value in section.get("properties", {}).items():
        for name, many in _references(value):
            where = ".".join(filter(None, (place, key, "<name>" if many else "")))
            first = name not in found
            found.setdefault(name, []).append(where)
            if first:
                _collect(known[name], where, known, found)


def _references(value: Schema, many: bool = False) -> Iterator[tuple[str, bool]]:
    """The definitions that a value refers to, and whether there may be many of them by name."""
    if "$ref" in value:
        yield value["$ref"].rsplit("/", 1)[1], many
    for other in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from _references(other, many)
    if isinstance(value.get("additionalProperties"), dict):
        yield from _references(value["additionalProperties"], True)


def _table(section: Schema) -> str:
    rows = [("key", "values", "default", "meaning"), ("---",) * 4]
    for key, value in section["properties"].items():
        default = "required" if key in section.get("required", ()) else _default(key, value)
        rows.append((f"`{key}`", _values(value), default, _text(value["description"])))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _default(key: str, value: Schema) -> str:
    default, references = value.get("default"), list(_references(value))
    if isinstance(default, dict) and references and not references[0][1]:
        return "below"  # the section's table says them
    if isinstance(default, dict) and references and default:
        return ", ".join(f"`{name}`" for name in default)  # likewise, of each name
    if key == "name" and "default" not in value:
        return "the file's"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _values(value: Schema) -> str:
    """What may stand there, in words."""
    if "anyOf" in value or "oneOf" in value:
        return " or ".join(dict.fromkeys(_values(other) for other in value.get("anyOf", value.get("oneOf"))))
    if "$ref" in value:
        return "section"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    kind = value.get("type", "any value")
    if kind == "object":
        inner = value.get("additionalProperties", True)
        return f"by name: {_values(inner) if isinstance(inner, dict) else 'any values'}"
    if kind == "array":
        items = [_values(one) for one in value.get("prefixItems", [value.get("items", {})])]
        return f"list of {' and '.join(items) if len(set(items)) > 1 else items[0]}"
    word = {"string": "text", "boolean": "`true`, `false`", "integer": "whole number", "number": "number"}.get(
        kind, kind
    )
    return " ".join([word, *_bounds(value)])


def _bounds(value: Schema) -> Iterator[str]:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    yield from (f"{word} {value[key]:g}" for key, word in words.items() if key in value)
    if "pattern" in value:
        yield f"matching `{value['pattern'].replace('|', chr(92) + '|')}`"


def _text(text: str) -> str:
    """In one line, fit for a table's cell."""
    code = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", r"\|"))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in code)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
