"""The README shows the code as it is."""

import json
import re
from pathlib import Path

import pytest
import torch

from opd_ray import recipes
from opd_ray.config import ModelConfig
from opd_ray.models import load_family
from tests.algorithms.parts import item, random_experience

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_in_the_readme_is_the_loop():
    source = (ROOT / "opd_ray" / "loop.py").read_text()
    shown = source[source.index("def train(") :].rstrip()
    assert f"```python\n{shown}\n```" in (ROOT / "README.md").read_text()


def test_every_link_of_the_documentation_leads_somewhere():

    broken = [
        f"{page.name}: {target}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_the_worlds_scores_are_the_records():
    record = json.loads((ROOT / "opd_ray/world/record.json").read_text())
    shown = (ROOT / "docs/world.md").read_text()
    for name, row in record["scores"]["models"].items():
        cells = [row[task][task] for task in ("compose", "text", "look")]
        cells += [row["mixed"][task] for task in ("compose", "text", "look")]
        assert f"| {name} | {row['guidance']:g} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in shown
    for guidance, row in record["guidance_sweep"]["base"].items():
        assert f"| {guidance} | {row['compose']:.3f} | {row['text']:.3f} | {row['look']:.3f} |" in shown


def test_the_recipe_of_the_readme_is_one(tmp_path):
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "teachers:" in text)
    (tmp_path / "my_recipe.yaml").write_text(block)
    config = recipes.load(str(tmp_path / "my_recipe.yaml"))
    assert (config.name, config.rounds, list(config.teacher_of_task)) == (
        "my_recipe",
        400,
        ["text", "photo", "painting"],
    )


@pytest.mark.parametrize("section", ["A reward", "An algorithm"])
def test_the_code_of_the_guide_runs_as_it_stands(tiny, section):
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.search(rf"## {section}\n.*?```python\n(.*?)```", guide, re.DOTALL)
    found = {}
    exec(code[1], found)
    if section == "A reward":
        assert found["brightness"](torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
    else:
        work = item(steps=(0, 2))
        experience = random_experience(load_family(ModelConfig(path=str(tiny)), text=False, image=False), work)
        forward, _ = list(found["Huber"]().forwards(experience, 0))
        assert found["Huber"]().loss(forward, {"student": forward.inputs["teacher"]}).value == 0
