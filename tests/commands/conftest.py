import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from opd_ray.cli import main

WORDS = ("red cat", "two dogs", "blue car", "a tree", "old house", "[red]ship[/] :cat:")
BRIGHT = "tests.commands.scoring:brightness"


@dataclass
class Outcome:
    """What a command left: its exit code, and what it wrote where."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refusal is."""
        assert self.code == 2 and self.out == "", (self.code, self.out, self.err)
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@pytest.fixture(scope="session")
def cli():
    """Run a command line in this process, as the console script does."""

    def run(*args) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        argv = ["opd-ray", *map(str, args)]
        with (
            patch.object(sys, "argv", argv),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main()
        return Outcome(end.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(cli, recipe, tmp_path_factory):
    """A whole run with an evaluation after each round: its folder, and what the command wrote."""
    out = tmp_path_factory.mktemp("finished") / "[bold]runs[/] :cat:"
    return out / "small", cli("train", recipe(), "--out", out, "--json", "-o", "evaluation.every=1")


@pytest.fixture
def no_start(monkeypatch):
    """Neither Ray nor a worker may start."""

    def started(config):
        raise AssertionError("the run started")

    monkeypatch.setattr("opd_ray.build.make_backend", started)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Prompt files: train.jsonl with tasks a and b, held.jsonl with a, b and mixed, which has no teacher."""
    folder = tmp_path_factory.mktemp("files")
    for name, tasks in (("train", ["a", "b"]), ("held", ["a", "b", "mixed"])):
        rows = [{"prompt": f"{name} {words} {task}", "task": task} for task in tasks for words in WORDS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def recipe(tiny, tiny_teachers, files, tmp_path_factory):
    """Write a recipe: two rounds in this process, two teachers, three held-out tasks. Sections are replaced whole."""

    def write(**changes) -> Path:
        run = {
            "name": "small",
            "rounds": 2,
            "model": {"path": str(tiny)},
            "student": {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8}},
            "sampling": {"steps": 3},
            "optimizer": {"lr": 1e-2},
            "ema": {"decay": 0.9, "every": 1},
            "batch": {"images_per_task": 2, "item_size": 2},
            "teachers": {
                "a": {"lora": str(tiny_teachers["a"]), "guidance": 1.0},
                "b": {"lora": str(tiny_teachers["b"]), "guidance": 3.0},
            },
            "rewards": {BRIGHT: {}, "look": {}},
            "prompts": {"train": str(files / "train.jsonl"), "eval": str(files / "held.jsonl")},
            "evaluation": {
                "images_per_task": 4,
                "steps": 2,
                "batch": 4,
                "rewards": {"a": [BRIGHT], "b": [BRIGHT], "mixed": [BRIGHT, "look"]},
            },
            "cluster": {"runtime": "local"},
        }
        kept = {key: value for key, value in (run | changes).items() if value is not None}
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(yaml.safe_dump(kept))
        return path

    return write
