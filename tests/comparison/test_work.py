"""Single pieces of work, in this process."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import Protocol, read_protocol
from opd_ray.comparison.work import perform
from opd_ray.models.lora import WEIGHTS
from opd_ray.storage.run_folder import read_json
from tests.comparison.test_protocol import small, written

PERFORM = """
import sys
from pathlib import Path
from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import read_protocol
from opd_ray.comparison.work import perform

perform(read_protocol(Path(sys.argv[1]))[0], Node("drawn-s0", "record", "drawn", 0, ()), Place(Path(sys.argv[2])))
"""


def merging() -> Protocol:
    """Two arms and the merge of their LoRAs."""
    merged = {"do": "merge", "group": "Main", "says": "of two", "of": ["one", "two"]}
    trained = {"group": "Main", "says": "one", "recipe": "demo"}
    chosen = {"one": trained, "two": trained, "merged": merged}
    return Protocol.model_validate(small(arms=chosen, hypotheses={}, seeds=[0]))


def test_a_merge_that_was_stopped_half_way_is_made_again(tiny_teachers: dict[str, Path], tmp_path: Path) -> None:
    """Its weights were there, and what says that they are whole was not."""
    place = Place(tmp_path)
    protocol = merging()
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


def test_recordings_book_what_their_teachers_took_also_where_they_were_stopped(tmp_path: Path) -> None:
    """Of each task 30 rounds of 4 pictures in 2 steps: 240 rows of the teacher without guidance, 480 of the other."""
    rounds, images, steps = 30, 4, 2
    tasks = ("look", "text")
    chosen = {
        "algorithm": {"name": "opd"},
        "batch": {"images_per_task": images, "item_size": images},
        "sampling.steps": steps,
        "teachers": {"look": {"lora": "world/look", "guidance": 1.0}, "text": {"lora": "world/text", "guidance": 2.0}},
        "rewards": {},
        "prompts": {"train": {task: f"world/{task}/train" for task in tasks}},
    }
    drawn = {"do": "record", "group": "Main", "says": "drawn", "recipe": "demo", "rounds": rounds, "set": chosen}
    file = written(tmp_path, small(arms={"drawn": drawn}, hypotheses={}, seeds=[0]))
    place, node = Place(tmp_path / "out"), Node("drawn-s0", "record", "drawn", 0, ())
    process = subprocess.Popen([sys.executable, "-c", PERFORM, str(file), str(place.out)], stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not any(place.work(node.key).glob("look/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert b"Stopped" in told, told
    stopped = read_json(place.cost(node.key))
    there = {task: len([*place.work(node.key).glob(f"{task}/*.safetensors")]) for task in tasks}
    assert not stopped["done"]
    assert stopped["core_seconds"] > 0.1
    assert stopped["forwards"] == {"teacher": images * steps * (there["look"] + 2 * there["text"])}
    assert 0 < there["look"] < rounds
    perform(read_protocol(file)[0], node, place)
    whole = read_json(place.cost(node.key))
    assert whole["done"]
    assert whole["core_seconds"] > stopped["core_seconds"]
    assert (whole["images"], whole["forwards"]) == (rounds * images * len(tasks), {"teacher": 240 + 480})
