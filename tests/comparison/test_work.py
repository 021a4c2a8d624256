"""Single pieces of work, in this process."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import opd_ray
from opd_ray.comparison.code import state_of_code
from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import Protocol, read_protocol
from opd_ray.comparison.work import perform
from opd_ray.models.lora import WEIGHTS
from opd_ray.storage.run_folder import read_json, write_json_atomic
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


def content(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file, which has its metadata in another order each time it is written."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


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
    before = content(whole)
    (folder / "merge.json").unlink()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    place.cost(node.key).unlink()
    perform(protocol, node, place)
    assert content((folder / WEIGHTS).read_bytes()) == before
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


def test_a_piece_says_which_code_made_it(tiny_teachers: dict[str, Path], tmp_path: Path) -> None:
    """Its states in order, `unknown` for what was begun before they were written down."""
    place, protocol = Place(tmp_path), merging()
    for name, folder in zip(("one", "two"), tiny_teachers.values(), strict=True):
        shutil.copytree(folder, place.work(f"{name}-s0"))
    node = Node("merged-s0", "merge", "merged", 0, ("one-s0", "two-s0"))
    found = []
    for before in (None, {"core_seconds": 1.0}, {"core_seconds": 1.0, "code": ["0.0.9+0123456789ab", state_of_code()]}):
        if before is not None:
            write_json_atomic(place.cost(node.key), before)
        perform(protocol, node, place)
        found.append(read_json(place.cost(node.key))["code"])
    now = state_of_code()
    assert re.fullmatch(re.escape(opd_ray.__version__) + r"\+[0-9a-f]{12}", now)
    assert found == [[now], ["unknown", now], ["0.0.9+0123456789ab", now]]


def test_any_change_of_a_source_or_recipe_is_another_state_of_the_code(tmp_path: Path) -> None:
    """A copy elsewhere is the same one; files that nothing imports or reads do not count."""
    root = Path(opd_ray.__file__).parents[1]
    for part in ("opd_ray", "configs"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    ask = [sys.executable, "-c", "from opd_ray.comparison.code import state_of_code; print(state_of_code())"]

    def state() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.check_output(ask, cwd=tmp_path, env=environment, text=True).strip()

    states = [state()]
    assert states == [state_of_code()]
    (tmp_path / "opd_ray" / "notes.txt").write_text("")
    assert state() == states[0]
    for file in ("opd_ray/algorithms/opd.py", "configs/cluster/local.yaml"):
        with (tmp_path / file).open("a") as opened:
            opened.write("# more\n")
        states.append(state())
    assert len(set(states)) == 3
