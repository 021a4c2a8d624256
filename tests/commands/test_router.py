"""`opd-ray evaluate --router`: each task by its own model, in a row of its own."""

import json

import pyarrow.parquet as pq
import pytest

from opd_ray.errors import ConfigError
from opd_ray.evaluation.router import Router, read_router
from tests.commands.conftest import BRIGHT


def test_routes():
    router = read_router(["a=one", "b=two", "c=one", "other"])
    assert router == Router({"a": "one", "b": "two", "c": "one"}, "other") and router.models == ("one", "two", "other")
    assert router.routes(["a", "b", "c", "d"]) == {"one": ("a", "c"), "two": ("b",), "other": ("d",)}
    assert read_router(["a=runs/x=1"]).by_task == {"a": "runs/x=1"} and read_router([]) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["a="], "--router a=: expected TASK=MODEL, or MODEL for all other tasks"),
        (["=m"], "--router =m: expected TASK=MODEL"),
        (["a=m", "a=n"], "--router a=n: a has a model already; give it one"),
        (["m", "n"], "--router n: the rest has a model already"),
        (["a=m"], "--router has no model for task b; add --router b=MODEL, or --router MODEL for the rest"),
        (["z=m", "n"], "--router z: no such task; the prompts have a, b"),
    ],
)
def test_what_it_refuses(given, text):
    with pytest.raises(ConfigError) as caught:
        read_router(given).routes(["a", "b"])
    assert text in str(caught.value)


def test_each_picture_is_its_specialists(cli, tiny, tiny_teachers, tmp_path):
    """Of two tasks: the router's scores are those of the model that draws the task alone, picture by picture."""
    for task in "ab":
        (tmp_path / f"{task}.txt").write_text(f"a red cat {task}\ntwo dogs {task}\n")
    one, two = f"{tiny}+{tiny_teachers['a']}", f"{tiny}+{tiny_teachers['b']}"
    prompts = [part for task in "ab" for part in ("--prompts", f"{task}={tmp_path / task}.txt")]
    how = ("--rewards", BRIGHT, "--steps", 2, "--guidance", 2, "--guidance", f"{two}=1", "--out", tmp_path / "out")
    done = cli("evaluate", one, two, *prompts, *how, "--router", f"a={one}", "--router", two, "--json")
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    of = {(row["model"], row["prompt"]): row[f"score_{BRIGHT}"] for row in rows}
    routed = [row for row in rows if row["model"] == "router"]
    assert [row["guidance"] for row in routed] == [2, 2, 1, 1]
    for row in routed:
        assert row[f"score_{BRIGHT}"] == of[one if row["task"] == "a" else two, row["prompt"]]
    told = json.loads(done.out)
    assert set(told["models"]["router"]) == {"a", "b"} and set(told["scores"]["router"]) == {"a", "b"}


def test_on_the_tiny_world(cli):
    args = ("--images", 2, "--steps", 2, "--json", "--guidance", 1)
    done = cli("evaluate", "world", *args, "--router", "text=world/text", "--router", "world")
    assert done.code == 0, done.err
    models = json.loads(done.out)["models"]
    specialist = json.loads(cli("evaluate", "world/text", *args).out)["models"]["world/text"]
    found = models["router"]["scores"]
    assert found["text"] == specialist["scores"]["text"] and found["compose"] == models["world"]["scores"]["compose"]
    assert set(models["router"]["routes"]) == {"compose, look, mixed", "text"}
    shown = cli("evaluate", "world", *args[:4], "--router", "text=world/text", "--router", "world").out
    assert "router: text by world/text: guidance 1, 2 steps" in shown
