import json

import pytest

from opd_ray.config import Config
from opd_ray.run import Run
from tests.runtime.runs import go

WORDS = ("red cat", "two dogs", "blue car", "a tree", "old house")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file with five prompts for each of the tasks a and b."""
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    rows = [{"prompt": f"{words}, {task}", "task": task} for task in "ab" for words in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_config(tiny, tiny_teachers, prompts):
    """A run of three rounds with two teachers; keywords replace whole sections, those of ``cluster`` one by one."""

    def make(runtime="local", *, cluster=None, **changes) -> Config:
        small = {"resources": {"cpu": 0.25}}
        placement = {"runtime": runtime, "rollout": small, "teachers": {"default": small}, "learner": small}
        run = {
            "name": "tiny",
            "rounds": 3,
            "model": {"path": str(tiny)},
            "student": {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8}},
            "sampling": {"steps": 4},
            "algorithm": {"name": "opd", "steps_per_item": 2},
            "batch": {"images_per_task": 4, "item_size": 2},
            "teachers": {
                "a": {"lora": str(tiny_teachers["a"]), "guidance": 1.0},
                "b": {"lora": str(tiny_teachers["b"]), "guidance": 2.0},
            },
            "prompts": {"train": str(prompts)},
            "checkpoint": {"every": 1},
            "cluster": placement | (cluster or {}),
        }
        return Config.model_validate(run | changes)

    return make


@pytest.fixture(scope="session")
def reference(make_config, tmp_path_factory):
    """Rounds -> the same run in this process."""
    known = {}

    def local(rounds):
        if rounds not in known:
            known[rounds] = go(make_config(rounds=rounds), tmp_path_factory.mktemp("local") / "run")
        return known[rounds]

    return local


@pytest.fixture
def config(make_config):
    """A run of two rounds that learns from how bright its drawings are."""

    def made(name, runtime="local", rounds=2, **changes) -> Config:
        algorithm = {"name": name, **changes.pop("algorithm", {})}
        settings = {
            "rounds": rounds,
            "rewards": {"tests.commands.scoring:brightness": {}},
            "batch": {"images_per_task": 4, "item_size": 4, "images_per_prompt": 2},
            "teachers": {},
        }
        return make_config(runtime, **(settings | {"algorithm": algorithm} | changes))

    return made


@pytest.fixture
def reports(monkeypatch):
    """The reports of every update of every round."""
    found, finish = [], Run.finish_round

    def finishing(run, batch, updates, weights):
        found.append([report for (report,) in updates])
        finish(run, batch, updates, weights)

    monkeypatch.setattr(Run, "finish_round", finishing)
    return found
