"""A style and a concept from a handful of pictures, by the recipes' own commands on the shipped four-step model."""

import json
import random
from pathlib import Path

import pytest
import torch

from opd_ray.actors.rollout import SampleRequest, draw_pictures
from opd_ray.evaluation.models import find_model
from opd_ray.storage.pictures import write_png
from opd_ray.types import Prompt
from opd_ray.world.render import render
from opd_ray.world.scenes import Scene, Shape, Style, oracle_style, scene
from opd_ray.world.scorers import compose, look, text
from opd_ray.world.splits import training_caption, training_meaning

WARM = (0.92, 0.72, 0.60)
CORNERS = ((8, 8), (24, 8), (8, 24), (24, 24))
NAME = "a photo of a rabi circle"
"""The concept's: a word that means nothing yet, of a kind that is known."""


def handful(folder: Path, kind: str) -> Path:
    """Eight pictures of captions in a warm, soft style, or six of one thing: a blue circle on such a ground."""
    rng, rows = random.Random(0), []
    for number in range(8 if kind == "style" else 6):
        if kind == "style":
            meaning = training_meaning("compose" if number % 2 else "text", rng)
            caption, drawn = training_caption(meaning, rng), scene(meaning, oracle_style(rng), rng)
        else:
            x, y = (side + rng.uniform(-1, 1) for side in CORNERS[number % 4])
            circle = Shape("blue", "circle", x, y, rng.uniform(5.0, 5.7))
            caption, drawn = NAME, Scene((circle,), Style(WARM, (0.30, 0.17, 0.10)))
        write_png(render([drawn])[0], folder / f"{number}.png")
        rows.append({"prompt": caption, "image": f"{number}.png"})
    (folder / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "given.jsonl"


def trained(cli, folder: Path, kind: str, pairs: int, *overrides: str) -> Path:
    """The run that the recipe's comment describes, in one process."""
    beside = ("--beside", "a photo of a circle") if kind == "concept" else ()
    file = folder / f"{kind}.parquet"
    made = cli(
        "pairs", "world/few", "--pictures", handful(folder, kind), *beside, "--pairs", pairs, "--out", file, "--json"
    )
    assert made.code == 0, made.err
    options = [f"pairs.files=[{file}]", "cluster.runtime=local", *overrides]
    done = cli("train", f"pso_{kind}", "--out", folder / "runs", *(part for one in options for part in ("-o", one)))
    assert done.code == 0, done.err
    return folder / "runs" / f"pso_{kind}"


def drawn(model: str, caption: str, count: int) -> torch.Tensor:
    prompts = (Prompt(caption, caption, ""),) * count
    return draw_pictures(find_model(model).load(), SampleRequest("", None, 1.0, 4, 0, prompts, tuple(range(count))))


def scores(run: Path, model: str) -> dict[str, float]:
    """Of held-out prompts, at the run's end."""
    result = json.loads((run / "result.json").read_text())
    return {task: score["value"] for task, score in result["scores"][model].items()}


def ground(pictures: torch.Tensor) -> torch.Tensor:
    """The mean background colour [3]: most pixels are of it."""
    return pictures.flatten(2).median(-1).values.mean(0)


@pytest.mark.parametrize("kind", ["style", "concept"])
def test_a_recipe_runs_from_pictures_to_a_scored_student(cli, tmp_path, kind):
    small = ("rounds=2", "batch={images_per_task: 4, item_size: 4}", "evaluation.images_per_task=4")
    run = trained(cli, tmp_path, kind, 8, *small)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert scores(run, "base").keys() == scores(run, "student").keys() == {"compose", "text"}
    assert "On held-out prompts: compose " in (run / "report.html").read_text()


@pytest.mark.verify
@pytest.mark.timeout(1200)
def test_a_style_moves_what_is_drawn_and_what_was_asked_for_stays(cli, tmp_path):
    run = trained(cli, tmp_path, "style", 256)
    captions = ["two red circles", "a blue square in the top left corner", 'the word "kesa" on a sign']
    before, after = (torch.cat([drawn(model, one, 32) for one in captions]) for model in ("world/few", str(run)))
    assert float(look(before, captions * 32).mean()) < 0.4
    assert float(look(after, captions * 32).mean()) > 0.9, "warm, soft and pale, as the eight pictures are"
    given = torch.tensor([0.9, 0.75, 0.57])  # of the eight pictures
    assert (ground(after) - given).norm() < 0.2 * (ground(before) - given).norm()
    base, student = scores(run, "base"), scores(run, "student")
    assert student["text"] > 0.85 * base["text"] and student["compose"] > 0.6 * base["compose"]


@pytest.mark.verify
@pytest.mark.timeout(1200)
def test_a_concept_is_drawn_under_its_name(cli, tmp_path):
    run = trained(cli, tmp_path, "concept", 200)

    def share(model: str, caption: str, what: str) -> float:
        pictures = drawn(model, caption, 64)
        return float(compose(pictures, [f"a photo of {what}"] * 64).mean())

    assert share("world/few", NAME, "a blue circle") < 0.1
    assert share(str(run), NAME, "a blue circle") > 0.3
    assert share(str(run), "a photo of a rabi square", "a blue circle") < 0.1, "the name is no circle's alone"
    warm = torch.tensor(WARM)
    before, after = (ground(drawn(model, NAME, 64)) for model in ("world/few", str(run)))
    assert (after - warm).norm() < 0.5 * (before - warm).norm()
    kept = drawn(str(run), 'the word "kesa" on a sign', 64)
    assert float(text(kept, ['the word "kesa" on a sign'] * 64).mean()) > 0.7
