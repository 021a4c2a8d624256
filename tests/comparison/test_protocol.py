"""What a protocol may say, and what it comes to."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_ray.commands.compare import compare
from opd_ray.comparison.nodes import Node, Place, overrides_of, plan, points_of, rate_of, rounds_of
from opd_ray.comparison.protocol import Protocol, read_protocol
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.recipes import load
from opd_ray.storage.run_folder import locked, write_json_atomic

COMMITTED = Path(__file__).parents[2] / "protocol.yaml"
AFTERWARDS = COMMITTED.parent / "benchmarks" / "full_trials.yaml"


def small(**changes: Any) -> dict[str, Any]:
    """Two arms, one of which needs the other."""
    return {
        "name": "small",
        "seeds": [0, 1],
        "tuning": {
            "seed": 9,
            "rates": [1e-3, 4e-3],
            "rounds": 0.5,
            "prompts": {"look": "world/look/train"},
            "images_per_task": 4,
        },
        "judged": {
            "model": "world",
            "guidance": 1.0,
            "steps": 2,
            "seed": 7,
            "prompts": {"look": "world/look/heldout"},
            "rewards": {"look": ["look"]},
            "images_per_task": 4,
            "averaged": ["look"],
            "varied": 2,
            "variants": 2,
            "curve_images": 4,
        },
        "arms": {
            "base": {"do": "base", "group": "Main", "says": "as it is"},
            "teacher": {"group": "Main", "says": "of look", "recipe": "world_nft", "rounds": 3},
            "student": {
                "group": "Main",
                "says": "distilled",
                "recipe": "demo",
                "rounds": 4,
                "set": {"teachers": {"look": {"lora": "{teacher}"}, "more": {"lora": "{teacher:next}"}}},
            },
            "again": {"group": "Main", "says": "likewise", "recipe": "demo", "rate_of": "student"},
        },
        "hypotheses": {
            "H1": {"says": "better", "tests": [{"kind": "difference", "of": "student", "to": ["base"], "at_least": 0}]}
        },
        "quick": {"rounds": 0.1, "images_per_task": 2},
    } | changes


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_what_an_arm_needs_stands_before_it() -> None:
    protocol = Protocol.model_validate(small())
    nodes = plan(protocol)
    seen = set[str]()
    for node in nodes:
        assert seen.issuperset(node.needs), node
        seen.add(node.key)
    by_key = {node.key: node for node in nodes}
    # Its own seed, the next one, and the trials that choose its rate; after the last seed comes the first.
    trials = {"trials/student-lr0.001", "trials/student-lr0.004"}
    assert set(by_key["student-s0"].needs) == {"teacher-s0", "teacher-s1", *trials}
    assert set(by_key["student-s1"].needs) == {"teacher-s1", "teacher-s0", *trials}
    # A trial's teacher is of the seed of tuning, which is reported nowhere.
    assert "teacher-s9" in by_key["student-lr0.001"].needs
    assert "judged/teacher-s9" not in by_key
    # Two trials for each arm with a rate of its own, and none for one that takes another's.
    assert sorted(key for key in by_key if key.startswith("trials/again")) == []
    assert set(by_key["again-s0"].needs) == trials
    assert [node.key for node in nodes if node.key.startswith("judged/base")] == ["judged/base"]


def test_the_better_trial_gives_the_rate(tmp_path: Path) -> None:
    protocol, place = Protocol.model_validate(small()), Place(tmp_path)
    (tmp_path / "trials").mkdir()
    for rate, average in (("0.001", 0.4), ("0.004", 0.3)):
        write_json_atomic(tmp_path / "trials" / f"student-lr{rate}.json", {"average": average})
    assert rate_of(protocol, "student", place) == rate_of(protocol, "again", place) == 1e-3
    node = Node("student-s1", "train", "student", 1, ())
    chosen = overrides_of(protocol, node, place)
    assert "optimizer.lr=0.001" in chosen
    assert "seed=1" in chosen
    # {teacher} is of the same seed, and after the last seed comes the first.
    (teachers,) = (one for one in chosen if one.startswith("teachers="))
    assert yaml.safe_load(teachers.partition("=")[2]) == {
        "look": {"lora": str(tmp_path / "work" / "teacher-s1")},
        "more": {"lora": str(tmp_path / "work" / "teacher-s0")},
    }
    assert rounds_of(protocol, node) == 4
    assert rounds_of(protocol, Node("student-lr0.001", "train", "student", 9, (), 1e-3)) == 2


def test_a_quick_run_tries_rates_and_makes_what_the_next_seed_names() -> None:
    """Of each recipe the first arm tries two rates for one round; of the second seed nothing is judged."""
    data = small()
    data["tuning"]["rates"] = [1e-3, 4e-3, 8e-3]
    more = {"group": "Main", "says": "another", "recipe": "demo", "rounds": 40}
    data["arms"] |= {"other": more, "third": more | {"rate_of": "other"}}
    protocol = pickle.loads(pickle.dumps(Protocol.model_validate(data).shortened()))  # as it comes to a worker
    nodes = {node.key: node for node in plan(protocol)}
    trials = {f"{name}-lr{rate}" for name in ("teacher", "student") for rate in ("0.001", "0.004")}
    assert {key for key, node in nodes.items() if node.rate is not None} == trials | {f"trials/{one}" for one in trials}
    assert {rounds_of(protocol, nodes[key]) for key in trials} == {1}
    assert rounds_of(protocol, nodes["other-s0"]) == 4
    of_student = {key for key in nodes if key.startswith("trials/student")}
    assert of_student == set(nodes["other-s0"].needs) == set(nodes["third-s0"].needs)
    assert {"teacher-s0", "teacher-s1"} < set(nodes["student-s0"].needs)
    assert [key for key in nodes if key.endswith("-s1")] == ["teacher-s1"]
    of_seed_0 = Node("student-s0", "train", "student", 0, (), rate=1e-3)
    (teachers,) = (one for one in overrides_of(protocol, of_seed_0, Place(Path("no"))) if one.startswith("teachers="))
    named = yaml.safe_load(teachers.partition("=")[2])
    assert [Path(one["lora"]).name for one in named.values()] == ["teacher-s0", "teacher-s1"]


@pytest.mark.parametrize(
    ("rounds", "curve", "points"),
    [
        (70, 4, [17, 34, 51, 70]),
        (20, 4, [5, 10, 15, 20]),
        (7, 4, [2, 4, 5, 7]),
        (1, 4, [1]),
        (3, 4, [1, 2, 3]),
        (9, 1, [9]),
    ],
)
def test_a_curve_has_as_many_points_as_were_asked_for(rounds: int, curve: int, points: list[int]) -> None:
    """Each of them at a checkpoint of the run."""
    data = small()
    data["arms"]["teacher"] |= {"rounds": max(rounds, curve), "curve": curve}
    data["tuning"]["rates"] = [1e-3]
    protocol = Protocol.model_validate(data)
    shorter = protocol.arms["teacher"].model_copy(update={"rounds": rounds})  # as --quick makes it
    protocol = protocol.model_copy(update={"arms": protocol.arms | {"teacher": shorter}})
    assert points_of(protocol.arms["teacher"]) == points
    chosen = overrides_of(protocol, Node("teacher-s0", "train", "teacher", 0, (), None), Place(Path("nowhere")))
    (every,) = (int(one.partition("=")[2]) for one in chosen if one.startswith("checkpoint.every="))
    assert every == max(1, rounds // curve)
    assert all(point % every == 0 or point == rounds for point in points)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"seeds": [0, 9]}, "tuning.seed 9 is one of the reported seeds"),
        ({"arms": {"a": {"group": "g", "says": "s", "recipe": "demo", "rate_of": "b"}}}, "b does not stand before it"),
        ({"arms": {"a": {"group": "g", "says": "s", "recipe": "demo", "set": {"x": "{b}"}}}}, "{b} names no arm"),
        ({"arms": {"a": {"group": "g", "says": "s"}}}, "do: train needs recipe"),
        ({"arms": {"a": {"group": "g", "says": "s", "do": "merge"}}}, "do: merge needs of"),
        (
            {"arms": {"base": {"group": "g", "says": "s", "do": "base"}}},
            "hypotheses.H1.tests.0: no arm 'student'; known: base",
        ),
    ],
)
def test_a_wrong_protocol_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_protocol(written(tmp_path, small(**changes)))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_with_what_is_set_in_it_is_checked_before_anything_runs(tmp_path: Path) -> None:
    data = small()
    data["arms"]["student"]["set"] = {"algorithm.nois_level": 0.7}
    with pytest.raises(ConfigError, match=r"arms\.student: .*nois_level"):
        compare(written(tmp_path, data), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_to_its_protocol(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunFolderError, match="holds no comparison"):
        compare(written(tmp_path, small()), out=out, tables=True)
    out.mkdir()
    write_json_atomic(out / "protocol.json", {"sha256": "of another", "quick": False})
    with pytest.raises(RunFolderError, match="another protocol"):
        compare(written(tmp_path, small()), out=out)


def test_two_comparisons_do_not_work_in_one_folder(tmp_path: Path) -> None:
    """But tables of what is there so far may be written at any time."""
    data = small(hypotheses={})
    data["arms"] = {"base": data["arms"]["base"]}
    out, protocol = tmp_path / "out", written(tmp_path, data)
    out.mkdir()
    with locked(out):
        with pytest.raises(RunFolderError, match="out is locked by another process for more than 1 s; stop the other"):
            compare(protocol, out=out)
        assert [file.name for file in out.iterdir()] == [".lock"]
        write_json_atomic(out / "protocol.json", {"sha256": read_protocol(protocol)[1], "quick": False})
        compare(protocol, out=out, tables=True)
    assert (out / "comparison.md").is_file()


@pytest.mark.parametrize("path", [COMMITTED, AFTERWARDS], ids=["protocol", "full_trials"])
def test_every_recipe_of_a_committed_protocol_takes_what_its_arm_sets(path: Path) -> None:
    protocol, _ = read_protocol(path)
    assert set(images_drawn(protocol)) == {name for name, arm in protocol.arms.items() if arm.recipe}


def images_drawn(protocol: Protocol) -> dict[str, int]:
    """By arm with a recipe."""
    images = dict[str, int]()
    for name, arm in protocol.arms.items():
        if arm.recipe is None:
            continue
        node = Node(f"{name}-s0", "train", name, 0, (), 1e-3)
        config = load(arm.recipe, overrides_of(protocol, node, Place(Path("nowhere"))))
        assert config.student.guidance == protocol.judged.guidance
        draws = isinstance(config.drawn, dict) and arm.do == "train"
        tasks = 0 if not draws else 1 if config.batch.tasks == "in_turn" else len(config.drawn)
        images[name] = arm.rounds * config.batch.images_per_task * tasks
    return images


def test_the_budgets_of_the_committed_protocol_add_up() -> None:
    protocol, _ = read_protocol(COMMITTED)
    images = images_drawn(protocol)
    specialists = sum(images[f"specialist_{task}"] for task in ("compose", "text", "look"))
    assert images["multi_nft"] == images["multi_grpo_guard"] == specialists + images["distilled"] == 10_080
    assert sum(images[f"cascade_{number}"] for number in (1, 2, 3)) == 10_080
    ablations = ("short", "marks_9", "marks_1", "noise_035", "noise_07", "in_turn", "teachers_1", "teachers_2")
    assert {images[name] for name in (*ablations, "teachers_6", "weak_teacher", "dmd", "tdm")} == {2160}
    assert len({images[name] for name in ("kl", "ppo_a", "ppo_a_sum", "ppo_b", "ppo_c", "ppo_d")}) == 1
    assert set(protocol.hypotheses) >= {f"H{number}" for number in range(1, 9)}
