"""One node of a comparison, in this process."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opd_ray.commands.merge import How, merge
from opd_ray.commands.record import record
from opd_ray.commands.train import interruptible, run_training
from opd_ray.comparison.angles import cosines
from opd_ray.comparison.code import state_of_code
from opd_ray.comparison.judge import adapter_of, base_of, judge, snapshot_of, tuned
from opd_ray.comparison.nodes import Node, Place, key_of, overrides_of, points_of
from opd_ray.comparison.protocol import Protocol
from opd_ray.config import Config
from opd_ray.errors import NotFiniteError
from opd_ray.recipes import load
from opd_ray.storage.run_folder import read_json, write_json_atomic

__all__ = ["perform"]


def perform(protocol: Protocol, node: Node, place: Place) -> None:
    """Do it and write what shows that it is done.

    A training goes on from its last checkpoint, a recording with what is missing.

    Raises:
        Stopped: a training or recording was asked to stop.
        UserError: its recipe, or what the protocol sets in it, is wrong.
    """
    torch.set_num_threads(1)
    for parent in (place.work(node.key).parent, place.found(node).parent):
        parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    state_of_code()  # before anything is made by it
    match node.kind:
        case "train":
            _train(protocol, node, place, started)
        case "record":
            _record(protocol, node, place, started)
        case "merge":
            arm, folder = protocol.arms[node.arm], place.work(node.key)
            loras = [str(place.work(key_of(protocol, name, node.seed))) for name in arm.of]
            if not (folder / "merge.json").is_file():
                if folder.exists():  # what a merge that was stopped has left
                    shutil.rmtree(folder)
                merge(loras, folder, **arm.merge.model_dump() | {"method": How(arm.merge.method)}, json=True)
            _book(place, node, started, {"images": 0, "forwards": {}}, done=True)
        case "judge":
            write_json_atomic(place.found(node), _judged(protocol, node, place))
        case "trial":
            write_json_atomic(place.found(node), _tried(protocol, node, place) | {"rate": node.rate})
        case "cosines":
            write_json_atomic(place.found(node), cosines(protocol, node, place))


def _train(protocol: Protocol, node: Node, place: Place, started: float) -> None:
    recipe, folder = protocol.arms[node.arm].recipe, place.work(node.key)
    assert recipe is not None
    config = load(recipe, overrides_of(protocol, node, place))
    used: dict[str, Any] = {"images": _drawn(config), "forwards": {}, "rate": config.optimizer.lr}
    done = False
    try:
        used["forwards"] = run_training(config, folder, resume=(folder / "run.json").is_file())["forwards"]
        done = True
    except NotFiniteError as error:
        if node.rate is None:
            raise
        used["diverged"], done = str(error), True  # of a trial that is an answer too
    finally:
        _book(place, node, started, used, done=done)


def _record(protocol: Protocol, node: Node, place: Place, started: float) -> None:
    recipe, folder, chosen = protocol.arms[node.arm].recipe, place.work(node.key), overrides_of(protocol, node, place)
    assert recipe is not None
    config = load(recipe, chosen)
    done = False
    try:
        with interruptible():
            record(recipe, chosen, out=folder, json=True)
        done = True
    finally:
        used = {"images": _drawn(config), "forwards": {"teacher": _rows_recorded(config, folder)}}
        _book(place, node, started, used, done=done)


def _rows_recorded(config: Config, folder: Path) -> int:
    """Rows of the teachers' forwards for all recordings that are there, two a step and picture where one guides."""
    rows = 0
    for task, name in config.teacher_of_task.items():
        recordings = len([*(folder / task).glob("*.safetensors")])
        each = 1 if config.teachers[name].guidance == 1 else 2
        rows += recordings * config.batch.item_size * config.sampling.steps * each
    return rows


def _book(place: Place, node: Node, started: float, used: Mapping[str, Any], *, done: bool) -> None:
    """What it took, with what earlier attempts at it took, and the states of the code that made it, in order."""
    file = place.cost(node.key)
    before: dict[str, Any] = read_json(file) if file.is_file() else {"core_seconds": 0.0, "code": []}
    seconds = before["core_seconds"] + time.process_time() - started
    code = [*dict.fromkeys([*before.get("code", ["unknown"]), state_of_code()])]
    write_json_atomic(file, {"done": done, "core_seconds": seconds, "code": code, **used})


def _drawn(config: Config) -> int:
    """Images that a run draws to learn from."""
    if config.drawn is None:
        return 0
    tasks = 1 if config.batch.tasks == "in_turn" else len(config.drawn) if isinstance(config.drawn, dict) else 1
    return config.rounds * config.batch.images_per_task * tasks


def _tried(protocol: Protocol, node: Node, place: Place) -> dict[str, Any]:
    if why := read_json(place.cost(node.model)).get("diverged"):
        return {"average": -1.0, "diverged": why}
    family, tuning = base_of(protocol.judged.model), protocol.tuning
    with adapter_of(family, place.work(node.model)):
        return tuned(protocol.judged, family, tuning.prompts, tuning.images_per_task)


def _judged(protocol: Protocol, node: Node, place: Place) -> dict[str, Any]:
    judged, arm, folder = protocol.judged, protocol.arms[node.arm], place.work(node.model)
    family = base_of(judged.model)
    with adapter_of(family, None if arm.do == "base" else folder):
        found = judge(judged, family, place.out / "pictures" / node.model)
    curve = list[dict[str, Any]]()
    if arm.curve:
        config = load(str(folder / "config.yaml"))
        for round in points_of(arm):
            with snapshot_of(family, folder, round):
                point = judge(judged, family, full=False)
            curve.append({"round": round, "images": _drawn(config) * round // arm.rounds, **point})
    return found | {"curve": curve}
