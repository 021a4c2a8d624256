"""The README shows the code as it is."""

import json
import re
from pathlib import Path

import torch
import yaml

from opd_ray import recipes
from opd_ray.config import ModelConfig, TeacherConfig
from opd_ray.models import load_family
from opd_ray.rewards import Scorer
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
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "rounds:" in text)
    (tmp_path / "my_recipe.yaml").write_text(block)
    config = recipes.load(str(tmp_path / "my_recipe.yaml"))
    assert (config.name, config.rounds, list(config.teacher_of_task)) == (
        "my_recipe",
        400,
        ["text", "photo", "painting"],
    )


def code(section: str, kind: str) -> list[str]:
    """The blocks of one section of the guide, each of at most 15 lines of its own."""
    (body,) = re.findall(rf"### {section}\n(.*?)(?=\n##|\Z)", README, re.DOTALL)
    return re.findall(rf"```{kind}\n(.*?)```", body, re.DOTALL)


def test_the_guides_reward_scores():
    (block,) = code("A reward", "python")
    exec(block, found := {})
    assert found["brightness"](torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [1, 1]
    assert Scorer("mine", found["brightness"]).prove() == "ranks 1 probe pair"


def test_the_guides_algorithm_is_one(tiny):
    (block,) = code("An algorithm", "python")
    exec(block, found := {})
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    algorithm, experience = found["Huber"](), random_experience(family, item(steps=(0, 2)))
    forward, _ = list(algorithm.forwards(experience, 0))
    assert algorithm.loss(forward, {"student": forward.inputs["teacher"]}).value == 0


def test_the_guides_family_passes_its_check():
    family, check = code("A model family", "python")
    exec(family, found := {})
    exec(check, found)
    loaded = found["Watercolour"].load(ModelConfig(path="world"), text=True, image=True)
    plain = load_family(ModelConfig(path="world"), text=True, image=False)
    assert torch.equal(
        loaded.encode(["a cat"])["pooled_projections"], plain.encode(["a cat, watercolour"])["pooled_projections"]
    )


def test_the_guides_teachers_are_configurations():
    teachers = yaml.safe_load(code("A teacher", "yaml")[0])["teachers"]
    found = {name: TeacherConfig.model_validate(teacher) for name, teacher in teachers.items()}
    assert [(one.path, one.guidance) for one in found.values()] == [
        ("org/text-lora", 4.5),
        ("./aesthetic", 4.5),
        ("org/portraits", 1.0),
    ]


def test_everything_of_the_guide_is_short():
    for section in ("A reward", "An algorithm", "A model family", "A teacher"):
        for kind in ("python", "yaml"):
            for block in code(section, kind):
                own = [line for line in block.splitlines() if line.strip() and not re.match("from |import ", line)]
                assert len(own) <= 15, section
