"""docs/operations.md knows every state, and every line that a run can say beside its progress; both ways.

Read from the source alone: what is given to `note`, what ends a run, and what those functions say whose words are
passed on.
"""

import ast
import re

import pytest

from opd_ray.runtime.health import State
from opd_ray.runtime.telemetry import METRICS, PREFIX
from opd_ray.runtime.telemetry import STATES as SHOWN
from tests.deploy.kustomize import ROOT
from tests.source import GAP, squeezed, template

PACKAGE = ROOT / "opd_ray"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "world" not in path.parts
}
SAYING = {
    "note",
    "_note",
    "Stopped",
    "NotFiniteError",
    "TooManyFailedError",
    "DriftError",
    "DiskFullError",
    "LearnerLostError",
}
PASSED_ON = {
    ("build.py", "text"): ["preflight.py:overlaps", "facts.py:other_versions"],
    ("commands/stages.py", "text"): ["runtime/session.py:clean"],
    ("scoring.py", "text"): ["scoring.py:same"],
    ("evaluation/compare.py", "text"): ["scoring.py:flat"],
    ("build.py", "str(startup)"): ["startup.py:__str__"],
    ("run.py", "text"): ["rows.py:told_of_pairs"],
    ("run.py", "line"): [
        "rows.py:told_of",
        "storage/control.py:serve",
        "runtime/scaling.py:tick",
        "runtime/scaling.py:restore",
        "runtime/scaling.py:_aim",
    ],
    ("storage/checkpoint.py", "_no_room(target, sum(map(len, contents.values())), error)"): [
        "storage/checkpoint.py:_no_room"
    ],
    ("run.py", "note"): ["storage/checkpoint.py:newest"],
    ("run.py", "sentence"): [
        "planning/advice.py:advice",
        "planning/advice.py:_nothing",
        "report/advice.py:store_advice",
    ],
    ("commands/compare.py", "in_one_line(error)"): ["storage/checkpoint.py:_no_room"],
    ("runtime/dispatch.py", "text"): ["runtime/telling.py:lost_worker", "runtime/telling.py:_phase"],
    ("runtime/pool.py", "''.join(why)"): ["runtime/jobs.py:exhausted"],
}
"""Where words of others are passed on -> who says them. Reasons that stand inside such lines are below."""
REASONS = ["runtime/pool.py:paused", "runtime/watch.py:fault"]


def spoken(node):
    """As ``template``, also of strings that are added up."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = [spoken(left), spoken(right)]
            return squeezed("".join(GAP if side is None else side for side in sides)) if any(sides) else None
    return template(node)


def calls():
    """What is said, and where: a call's file and first argument."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                function = ast.unparse(node.func)
                if function.split(".")[-1] in SAYING or function.endswith("remarks.append"):
                    yield file, node.args[0]


def function(place):
    file, name = place.split(":")
    (found,) = (n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def sentences(node):
    """Every string in a function's body that reads as a sentence, whole: not the parts of a longer one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    if isinstance(node, ast.Raise):
        return  # errors have their own page
    found = spoken(node)
    if found is not None:
        if len(re.findall(r"[\w.]*[a-z][\w.]*", found)) >= 3 or ": " in found:
            yield found.strip()
        return
    for child in ast.iter_child_nodes(node):
        yield from sentences(child)


def said():
    """Everything that can be said, as templates."""
    direct = [spoken(argument) for _, argument in calls()]
    producers = [*(place for places in PASSED_ON.values() for place in places), *REASONS]
    passed = [text for place in producers for part in function(place).body for text in sentences(part)]
    return {text for text in [*direct, *passed] if text is not None}


def first_column(section):
    """The code in the first cells of a section's tables."""
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)[1]
    cells = re.findall(r"^\| (.*?) \|", body, flags=re.MULTILINE)
    return [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


def test_nobody_passes_on_words_that_are_not_looked_at():
    unread = {(file, ast.unparse(argument)) for file, argument in calls() if spoken(argument) is None}
    assert unread == set(PASSED_ON)


def test_every_line_that_a_run_says_is_explained():
    missing = sorted(said() - set(first_column("What a run says")))
    assert not missing, "docs/operations.md, 'What a run says', lacks:\n  " + "\n  ".join(missing)


def test_no_line_is_explained_that_no_run_says():
    stale = sorted(set(first_column("What a run says")) - said())
    assert not stale, "docs/operations.md explains what nobody says any more:\n  " + "\n  ".join(stale)


def test_every_state_of_a_worker_is_explained():
    assert first_column("States of a worker") == ["wanted", *(state.value for state in State)]
    assert set(SHOWN) < {"wanted", *(state.value for state in State)}


def statuses():
    """What `status.json` and `result.json` may say: the words that run.py and train.py write."""
    for file in ("run.py", "commands/train.py"):
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.FunctionDef) and node.name in {"status", "stop", "outcome", "result"}:
                names = [argument.arg for argument in node.args.args][::-1]
                yield from (d.value for a, d in zip(names, node.args.defaults[::-1], strict=False) if a == "status")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                wanted = {"status": 0, "result": 0, "outcome": 0, "stop": 1}.get(node.func.attr)
                if wanted is not None and len(node.args) > wanted and isinstance(node.args[wanted], ast.Constant):
                    yield node.args[wanted].value


def test_every_status_of_a_run_is_explained():
    assert set(first_column("Status of a run")) == set(statuses()) == {"running", "done", "stopped", "failed"}


def test_every_check_of_the_doctor_is_explained():
    findings = function("planning/doctor.py:findings")
    (table,) = (node for node in ast.walk(findings) if isinstance(node, ast.Dict))
    names = [key.value for key in table.keys]
    assert first_column("What the doctor says") == [*names, "manifests"]


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"\b{PREFIX}opd_ray_\w+", PAGE))))
def test_the_page_names_metrics_that_exist(name):
    assert name in {PREFIX + metric.name for metric in METRICS}
