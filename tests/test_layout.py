"""The layering of the package and its budgets, read from the source alone (nothing is imported)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opd_ray"
RUNGS = (
    {"types", "errors", "plugins", "seeds", "digest"},
    {"config", "recipes", "prompts", "pairs", "diffusion"},
    {"models", "algorithms", "rewards", "world"},
    {"actors", "learners"},
    {"storage", "metrics"},
    {"runtime"},
    {
        "loop",
        "run",
        "rows",
        "answers",
        "scoring",
        "facts",
        "preflight",
        "experience",
        "build",
        "roles",
        "pools",
        "startup",
        "recording",
        "stages",
        "evaluation",
        "planning",
        "report",
    },
    {"commands", "comparison", "cli", "console", "__main__", "testing"},
    {"__init__"},  # what users import, from everywhere
)
RUNG = {name: rung for rung, names in enumerate(RUNGS) for name in names}

# Where any exception may end: work-item errors (Ray catches those of remote workers, `local` its
# own; the dispatcher keeps them for whoever waits), the import of a user's module, the tools that
# mirror metrics, which never end a run, and arms of a comparison, each of which fails for itself.
SUPERVISION = {
    "actors/reward.py",
    "rewards/base.py",
    "runtime/local.py",
    "runtime/dispatch.py",
    "plugins.py",
    "metrics.py",
    "comparison/workers.py",
}
# Together they are what a newcomer has to read.
CORE = {"loop", "build", "actors", "learners", "runtime", "diffusion"}

SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def top(name: str) -> str:
    """``learners/engine.py`` -> ``learners``."""
    return name.removesuffix(".py").split("/")[0]


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, also inside functions."""
    package = ["opd_ray", *name.split("/")[:-1]]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    """Every node of a kind, with its place as ``file:line``."""
    for name, tree in TREES.items():
        found = (node for node in ast.walk(tree) if isinstance(node, kind))
        yield from ((f"{name}:{node.lineno}", node) for node in found)


def keywords(call: ast.Call) -> dict[str | None, str]:
    """The keyword arguments of a call, as source text."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def report(faults: list[str], rule: str) -> None:
    """Fail with every fault by name."""
    assert not faults, f"{rule}\n  " + "\n  ".join(faults)


def test_every_module_has_a_rung_and_imports_downwards() -> None:
    faults = []
    for name in SOURCES:
        mine = top(name)
        if mine not in RUNG:
            faults.append(f"{name} is on no rung; known: {', '.join(sorted(RUNG))}")
            continue
        for line, module in imports(name):
            root, part = [*module.split("."), ""][:2]
            # Otherwise a name of the package itself: its version is anybody's, what users import is not ours to.
            theirs = RUNG.get(part, 0 if part in {"", "__version__"} else RUNG["__init__"])
            if root == "opd_ray" and theirs > RUNG[mine]:
                faults.append(f"{name}:{line} (rung {RUNG[mine]}) imports {module} (rung {theirs})")
    report(faults, "a module imports its own rung or below, never above:")


def test_only_the_runtime_imports_ray() -> None:
    faults = [
        f"{name}:{line} imports {module}"
        for name in SOURCES
        for line, module in imports(name)
        if module.split(".")[0] == "ray" and top(name) != "runtime"
    ]
    report(faults, "only opd_ray/runtime imports ray:")


def test_nothing_can_execute_on_load() -> None:
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    faults = [
        f"{name}:{line} imports {module}"
        for name in SOURCES
        for line, module in imports(name)
        if module.split(".")[0] in banned or module == "torch.load"
    ]
    for place, call in nodes(ast.Call):
        safe = keywords(call).get("weights_only") == "True"
        if ast.unparse(call.func) == "torch.load" and not safe:
            faults.append(f"{place} calls torch.load without weights_only=True")
    report(faults, "no unpickling (torch.load needs a literal weights_only=True):")


def test_every_wait_on_ray_has_a_timeout() -> None:
    faults = []
    for name in SOURCES:
        taken = {"ray.get", "ray.wait", "ray.*"}
        faults += [f"{name}:{line} imports {m}" for line, m in imports(name) if m in taken]
    for place, alias in nodes(ast.alias):
        if alias.name == "ray" and alias.asname not in (None, "ray"):
            faults.append(f"{place} renames ray")
    for place, call in nodes(ast.Call):
        function = ast.unparse(call.func)
        if function not in ("ray.get", "ray.wait"):
            continue
        given = keywords(call)
        if given.get("timeout", "None") == "None":
            faults.append(f"{place} {function} without timeout=")
        if function == "ray.wait" and given.get("fetch_local") != "False":
            faults.append(f"{place} ray.wait without fetch_local=False")
    report(faults, "every wait on Ray is written ray.get/ray.wait, and has a timeout:")


def test_broad_excepts_only_where_supervision_lives() -> None:
    faults = []
    for place, handler in nodes(ast.ExceptHandler):
        caught = ast.unparse(handler.type) if handler.type else "BaseException"
        broad = {"Exception", "BaseException"} & set(caught.strip("()").replace(" ", "").split(","))
        if broad and place.rsplit(":", 1)[0] not in SUPERVISION:
            faults.append(f"{place} catches {broad.pop()}")
    report(faults, f"broad excepts outside {sorted(SUPERVISION)}:")


def test_names_say_what_a_module_holds() -> None:
    vague = ("utils", "helpers", "manager", "wrapper", "hub", "misc", "common")
    words = {name: set(re.split("[/_]", name.removesuffix(".py"))) for name in SOURCES}
    faults = [name for name, parts in words.items() if parts & set(vague)]
    report(faults, f"no module is named {', '.join(vague)}:")


def test_no_file_is_over_400_lines() -> None:
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    faults = [f"{name}: {length} lines" for name, length in lengths.items() if length > 400]
    report(faults, "files over 400 lines:")


def test_no_function_is_over_60_lines() -> None:
    faults = [
        f"{place} {node.name}: {length} lines"
        for place, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef))
        if (length := node.end_lineno - node.lineno + 1) > 60
    ]
    report(faults, "functions over 60 lines:")


def test_the_core_stays_small() -> None:
    parts = dict.fromkeys(sorted(CORE), 0)
    for name, source in SOURCES.items():
        if top(name) in CORE:
            parts[top(name)] += len(source.splitlines())
    assert sum(parts.values()) < 6800, f"over 6,800 lines: {parts}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..errors import E", "opd_ray.errors.E"),
        ("from . import pool", "opd_ray.runtime.pool"),
        ("def f():\n    import ray.util", "ray.util"),
        ("from opd_ray import loop", "opd_ray.loop"),
    ],
)
def test_the_reader_of_imports_sees(monkeypatch, source, expected) -> None:
    monkeypatch.setitem(TREES, "runtime/local.py", ast.parse(source))
    assert [module for _, module in imports("runtime/local.py")] == [expected]
