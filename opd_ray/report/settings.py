"""The page's settings and versions: what was asked for, with what it ran, and whatever could not be read."""

import json
from collections.abc import Iterable, Iterator
from html import escape

from opd_ray.report.run_folder import RunFolder, mapping
from opd_ray.report.wording import count

__all__ = ["settings"]

MOST_ENTRIES = 4
"""Longer lists are counted; config.yaml, below the table, has them whole."""


def settings(run: RunFolder) -> str:
    """A line for each section of the configuration and for the versions; then the files themselves."""
    lines = [(key, list(_flat(value))) for key, value in run.config.items()]
    lines.append(("versions", list(_flat(run.facts.get("versions")))))
    rows = "".join(_row(key, pairs) for key, pairs in lines if pairs)
    parts = [f'<div class="scroll"><table class="settings">{rows}</table></div>'] if rows else []
    if run.config_text:
        parts.append(
            f"<details><summary>config.yaml, as resolved</summary><pre>{escape(run.config_text)}</pre></details>"
        )
    # What a run is resumed by (`identity`) says the configuration once more.
    shown = {"versions", "identity"} if run.config_text else {"versions"}
    facts = [(key, list(_flat(value))) for key, value in run.facts.items() if key not in shown]
    if facts:
        rows = "".join(_row(key, pairs) for key, pairs in facts)
        amount = count(sum(len(pairs) for _, pairs in facts), "fact")
        parts.append(
            f"<details><summary>run.json, {amount}</summary>"
            f'<div class="scroll"><table class="settings">{rows}</table></div></details>'
        )
    if run.problems:
        parts.append(f'<p class="missing">{escape("; ".join(run.problems))}.</p>')
    return "".join(parts)


def _row(head: str, pairs: Iterable[tuple[str, str]]) -> str:
    said = "".join(
        f"<span>{escape(key)} <b>{escape(value)}</b></span> " if key else f"<b>{escape(value)}</b> "
        for key, value in pairs
    )
    return f'<tr><th scope="row">{escape(head)}</th><td>{said}</td></tr>'


def _flat(data: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name; what was left empty is left out."""
    if isinstance(data, dict):
        for key, value in mapping(data).items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(data, list):
        scalar = all(isinstance(x, str | int | float) for x in data)
        short = len(data) <= MOST_ENTRIES and scalar
        if data:
            yield prefix, ", ".join(map(str, data)) if short else f"{len(data)} entries"
    elif data is not None:
        yield prefix, data if isinstance(data, str) else json.dumps(data, default=str)
