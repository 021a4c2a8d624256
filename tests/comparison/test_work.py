"""Single pieces of work, in this process."""

import shutil
from pathlib import Path

from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import Protocol
from opd_ray.comparison.work import perform
from opd_ray.models.lora import WEIGHTS
from opd_ray.storage.run_folder import read_json
from tests.comparison.test_protocol import small


def arms(**chosen: object) -> Protocol:
    return Protocol.model_validate(small(arms=chosen, hypotheses={}, seeds=[0]))


def test_a_merge_that_was_stopped_half_way_is_made_again(tiny_teachers: dict[str, Path], tmp_path: Path) -> None:
    """Its weights were there, and what says that they are whole was not."""
    place = Place(tmp_path)
    merged = {"do": "merge", "group": "Main", "says": "of two", "of": ["one", "two"]}
    trained = {"group": "Main", "says": "one", "recipe": "demo"}
    protocol = arms(one=trained, two=trained, merged=merged)
    for name, folder in zip(("one", "two"), tiny_teachers.values(), strict=True):
        shutil.copytree(folder, place.work(f"{name}-s0"))
    node = Node("merged-s0", "merge", "merged", 0, ("one-s0", "two-s0"))
    perform(protocol, node, place)
    folder = place.work(node.key)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / "merge.json").unlink()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    place.cost(node.key).unlink()
    perform(protocol, node, place)
    assert (folder / WEIGHTS).read_bytes() == whole
    assert read_json(place.cost(node.key))["done"]
    assert place.done(node)
