"""The report page: one file, readable without its script, and without anything from outside.

Prompts, configuration values and names are other people's text: each passes through ``escape`` on
its way in, and the page's own content policy forbids network and every script but page.js besides.
"""

import base64
import hashlib
import os
from html import escape
from pathlib import Path

from opd_ray.report.gap import gaps
from opd_ray.report.pictures import picture_grid
from opd_ray.report.rewards import rewards
from opd_ray.report.run_folder import RunFolder, mapping, numbers
from opd_ray.report.settings import settings
from opd_ray.report.table import Results, Score, summary
from opd_ray.report.timing import time_spent
from opd_ray.report.training import curves
from opd_ray.report.wording import MISSING, Write, duration, model_title, percent, span

__all__ = ["write_report"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
STATUS = {"done": "done", "stopped": "stopped, can be resumed", "failed": "failed"}


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from whatever the run has left so far.

    Raises:
        RunFolderError: there is no such folder.
    """
    run = RunFolder.read(run_dir)
    target = run_dir / "report.html"
    draft = run_dir / ".report.html.tmp"
    draft.write_text(page(run), encoding="utf-8")
    os.replace(draft, target)  # a browser that reloads never sees half a page
    return target


def page(run: RunFolder) -> str:
    """The whole page."""
    taught = bool(run.teacher_of_task)
    sections = [
        _section("Result", _result(run), "No scores: the models have not been evaluated yet."),
        _section(
            "Pictures",
            picture_grid(run.samples, run.teacher_of_task) if run.samples else "",
            "No samples: no pictures have been drawn for comparison yet.",
            "Same prompt and seed across each row. "
            + "A marked teacher is on the task it teaches. " * taught
            + "Click a row to see it large; ← and → lead on, Esc leads back.",
        ),
        _section("Training", curves(run), "No metrics: no round has finished yet."),
        _section(
            "Gap to the teacher, before and after",
            gaps(run),
            "No gaps in the metrics: the algorithm reports none." if run.rounds and taught else "",
        ),
        _section(
            "Rewards",
            rewards(run),
            "",
            "Each proved itself before its first score counted. What it then failed on has no score.",
        ),
        _section("Where the time went", time_spent(run), ""),
        _section("Settings and versions", settings(run), ""),
    ]
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest=digest)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)} · opd_ray</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>{_header(run)}{''.join(sections)}</main><script>{script}</script></body></html>\n"
    )


def _section(title: str, body: str, missing: str, note: str = "") -> str:
    if not body and not missing:
        return ""
    lead = f'<p class="note">{escape(note)}</p>' if note and body else ""
    content = body or f'<p class="missing">{escape(missing)}</p>'
    return f"\n<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def _header(run: RunFolder) -> str:
    status = str(run.result.get("status", ""))
    label = STATUS.get(status, "unfinished")
    if run.result:
        sentence = summary(run.result, run.train_s)
    else:
        total = f" of {run.total_rounds}" if run.total_rounds else ""
        sentence = f"No result yet: {len(run.rounds)}{total} rounds are recorded."
    facts = []
    if run.rounds:
        total = f" / {run.total_rounds}" if run.total_rounds else ""
        facts.append(("rounds", f"{len(run.rounds)}{total}"))
    if run.train_s:
        facts.append(("time in rounds", duration(run.train_s)))
    last = run.rounds[-1].weight_version if run.rounds else ""
    version = str(run.result.get("weight_version") or last)
    facts += [("weights", version)] if version else []
    for name, key in (("student", "student_sha256"), ("average (EMA)", "ema_sha256")):
        digest = run.result.get(key)
        if digest:
            facts.append((f"{name} sha256", str(digest)[:12]))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return (
        f'<header><p class="eyebrow">opd_ray · run report</p><h1>{escape(run.name)}'
        f' <span class="status {escape(status) or "unfinished"}">{escape(label)}</span></h1>'
        f'<p class="outcome">{escape(sentence)}</p><dl class="facts">{items}</dl></header>'
    )


def _result(run: RunFolder) -> str:
    results = Results.read(run.result)
    if not results.models:
        return ""
    ranges = "".join(_range(results, task) for task in results.tasks)
    teacher = '<li class="own"><i></i>its teacher</li>' if results.own else ""
    return (
        f'<div class="ranges">{ranges}</div><ul class="legend marks"><li class="base"><i></i>base'
        f'</li>{teacher}<li class="me"><i></i>student</li>'
        "<li>lines: the intervals</li></ul>"
        f"{_table(results)}{_conditions(run)}"
    )


def _range(results: Results, task: str) -> str:
    """One task as a line: base, its teacher and the student, with their intervals."""
    own = results.own.get(task, "")
    marks = {
        style: score
        for style, model in (("base", "base"), ("own", own), ("me", "student"))
        if (score := results.scores.get((model, task))) and score.value is not None
    }
    bounds = [x for s in marks.values() for x in (s.value, s.low, s.high) if x is not None]
    if not bounds:
        return ""
    low, high = min(bounds), max(bounds)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    width = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / width:.2f}%"

    drawn, write = [], results.write(task)
    for style, score in marks.items():
        if score.low is not None and score.high is not None:
            size = f"{100 * (score.high - score.low) / width:.2f}%"
            drawn.append(f'<i class="{style}" style="left:{place(score.low)};width:{size}"></i>')
        if score.value is not None:
            tip = f"{style.replace('own', 'teacher').replace('me', 'student')} {write(score.value)}"
            drawn.append(f'<b class="{style}" style="left:{place(score.value)}" title="{tip}"></b>')
    gap = results.gap_closed.get(task)
    untaught = "no teacher of its own" if results.own else ""
    taught = f"taught by {own.removeprefix('teacher:')}" if own else untaught
    if gap:
        said = f"<strong>{percent(gap.value)}</strong> of the gap"
    else:
        said = " → ".join(write(marks[style].value) for style in ("base", "me") if style in marks)
    return (
        f'<div class="range"><div class="name">{escape(task)}<small>{escape(taught)}</small></div>'
        f'<div class="track"><span class="end">{low:.3g}</span>'
        f'<div class="rail">{"".join(drawn)}</div><span class="end">{high:.3g}</span></div>'
        f'<div class="closed">{said}</div></div>'
    )


def _table(results: Results) -> str:
    heads = "".join(f'<th scope="col">{escape(task)}</th>' for task in results.tasks)
    rows = []
    for model in results.models:
        cells = []
        for task in results.tasks:
            own = results.own.get(task) == model
            cells.append(_cell(results.scores.get((model, task)), results.write(task), "own" if own else ""))
        style = ' class="me"' if model == "student" else ""
        rows.append(f'<tr{style}><th scope="row">{escape(model_title(model))}</th>{"".join(cells)}</tr>')
    if results.gap_closed:
        cells = []
        for task in results.tasks:
            gap = results.gap_closed.get(task)
            shown = f"{percent(gap.value)}<small>{span(gap.low, gap.high, percent)}</small>" if gap else MISSING
            cells.append(f"<td>{shown}</td>")
        rows.append(f'<tr class="gap"><th scope="row">gap closed</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll"><table class="numbers scores"><thead><tr><th></th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(score: Score | None, write: Write, style: str) -> str:
    if score is None or score.value is None:
        return f'<td class="none">{MISSING}</td>'
    interval = span(score.low, score.high, write)
    exact = f"{score.value!r}"
    mark = f' class="{style}"' if style else ""
    return f'<td{mark} title="{exact}">{write(score.value)}<small>{interval}</small></td>'


def _counts(scores: object) -> list[float]:
    return [found["n"] for score in mapping(scores).values() if "n" in (found := numbers(score))]


def _conditions(run: RunFolder) -> str:
    """How the scores were made, in one line."""
    test = mapping(run.result.get("evaluation"))
    said = ["Outlined: a teacher on the task it teaches."] if run.teacher_of_task else []
    counts = {int(n) for scores in mapping(run.result.get("scores")).values() for n in _counts(scores)}
    if counts:
        amount = "to".join(f" {n} " for n in sorted({min(counts), max(counts)})).strip()
        said.append(f"{amount} images a task, the same prompts and seeds for every model.")
    if "steps" in test:
        said.append(f"{test['steps']} denoising steps, seed {test.get('seed', MISSING)}.")
    guidance = mapping(test.get("guidance"))
    if guidance:
        said.append("Guidance: " + ", ".join(f"{model_title(m)} {g}" for m, g in guidance.items()) + ".")
    return f'<p class="note">{escape(" ".join(said))}</p>'
