"""A summary as Markdown."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opd_ray.report.wording import MISSING, alike, count, span

__all__ = ["markdown", "plain"]

SHOWN = 4
"""Prompts of each task whose pictures are shown side by side."""


def markdown(told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pictures: str = ".") -> str:
    """What a person reads: scores, tags, wins, failures, some pictures, and what scored.

    Args:
        told: of ``summary``, with what was asked beside.
        rows: one a picture.
        pictures: the folder that their files are in, as seen from where this is written.
    """
    parts = ["# Evaluation", _asked(told), "## Scores", _scores(told["scores"])]
    if told["tags"]:
        parts += ["## By tag", "The overall score is the mean of the tags, each as much as another.", _tags(told)]
    if told["wins"]:
        parts += ["## Wins", "At the same prompts and first noises; a tie is half a win.", _wins(told["wins"])]
    if told["failures"]:
        parts += ["## Left out", "A failure is no score.", _failures(told["failures"])]
    if shown := _pictures(rows, pictures):
        parts += ["## Pictures", shown]
    return "\n\n".join([*parts, "## What scored", _versions(told["versions"])]) + "\n"


class _Link(str):
    """Markdown that is meant as such."""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Every cell but a link is shown as it is: prompts, tasks and errors come from files that others wrote."""
    cells = ([cell if isinstance(cell, _Link) else plain(str(cell)) for cell in row] for row in [head, *rows])
    first, *others = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, f"|{' --- |' * len(head)}", *others])


def plain(text: str) -> str:
    """Text as Markdown that shows it, in one line; an underscore within a word means nothing there."""
    return re.sub(r"[\\`*\[\]~|$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def _asked(told: Mapping[str, Any]) -> str:
    drawn = f", {count(told['images_per_prompt'], 'image')} a prompt, seed {told['seed']}" if "seed" in told else ""
    return f"{count(told['pictures'], 'picture')}{drawn}. Means with 95 % bootstrap intervals over prompts."


def _scores(scores: Mapping[str, Any]) -> str:
    head = ("task", "reward", "model", "mean", "95 % interval", "n", "failed")
    keys = dict.fromkeys((task, reward) for of in scores.values() for task, by in of.items() for reward in by)
    rows: list[Sequence[Any]] = []
    for task, reward in keys:
        found = {model: of[task][reward] for model, of in scores.items() if reward in of.get(task, {})}
        write = alike(one[name] for one in found.values() for name in ("value", "low", "high"))
        for model, one in found.items():
            interval = span(one["low"], one["high"], write) or MISSING
            rows.append((task, reward, model, write(one["value"]), interval, one["n"], one["failed"] or ""))
    return _table(head, rows)


def _tags(told: Mapping[str, Any]) -> str:
    found = [
        (task, reward, model, one)
        for model, of in told["tags"].items()
        for task, by_reward in of.items()
        for reward, one in by_reward.items()
    ]
    names = list(dict.fromkeys(tag for *_, one in found for tag in one["by_tag"]))
    rows = []
    for task, reward, model, one in sorted(found, key=lambda row: row[:2]):
        values = [one["overall"]["value"], *(one["by_tag"].get(tag, {"value": None})["value"] for tag in names)]
        write = alike(values)
        interval = span(one["overall"]["low"], one["overall"]["high"], write) or MISSING
        rows.append((task, reward, model, write(values[0]), interval, *map(write, values[1:])))
    return _table(("task", "reward", "model", "overall", "95 % interval", *names), rows)


def _wins(wins: Sequence[Mapping[str, Any]]) -> str:
    write = alike([1.0])
    rows = [
        (
            *(one[name] for name in ("task", "reward", "model", "over")),
            write(one["value"]),
            span(one["low"], one["high"], write) or MISSING,
            one["n"],
            one["ties"],
        )
        for one in wins
    ]
    return _table(("task", "reward", "model", "over", "wins", "95 % interval", "n", "ties"), rows)


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    names = ("reward", "model", "prompt", "sample", "error")
    return _table(names, [[one[name] for name in names] for one in failures])


def _pictures(rows: Sequence[Mapping[str, Any]], folder: str) -> str:
    """The first sample of the first prompts of each task, a column a model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if row["file"] and row["sample"] == 0:
            shown.setdefault((row["task"], row["prompt_id"], row["prompt"]), {})[row["model"]] = row["file"]
    taken: dict[str, int] = {}
    lines = []
    for (task, _, prompt), files in shown.items():
        taken[task] = taken.get(task, 0) + 1
        if taken[task] <= SHOWN:
            places = [Path(folder, files[model]).as_posix() if model in files else "" for model in models]
            cells = [_Link(f"![]({quote(place)})") if place else "" for place in places]
            lines.append((task, prompt, *cells))
    return _table(("task", "prompt", *models), lines) if lines else ""


def _versions(versions: Mapping[str, Any]) -> str:
    """Where a reward's environment is another one than the driver's, what differs stands in its row."""
    rows = [
        (
            name,
            one["proof"],
            one["code"],
            ", ".join(f"{key}={value}" for key, value in one["arguments"].items()),
            ", ".join(f"{file} {sha256[:12]}" for file, sha256 in one["weights"].items()),
            ", ".join(f"{key} {is_}" for key, is_ in one["packages"].items() if versions["packages"].get(key) != is_),
        )
        for name, one in versions["rewards"].items()
    ]
    head = ("reward", "proof", "code", "arguments", "weights", "other packages")
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items())
    return f"{_table(head, rows)}\n\n{packages}"
