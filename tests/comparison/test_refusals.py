"""Wrong protocols: each is refused in one line before anything is made."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from opd_ray.commands.compare import compare
from opd_ray.comparison.checks import check
from opd_ray.comparison.nodes import Place
from opd_ray.comparison.protocol import read_protocol
from opd_ray.comparison.results import gather
from opd_ray.comparison.tables import write_tables
from opd_ray.comparison.verdicts import Verdict
from opd_ray.errors import ConfigError
from opd_ray.storage.run_folder import write_json_atomic
from tests.comparison.test_compare import tiny
from tests.comparison.test_protocol import AFTERWARDS, COMMITTED, written

RATIO = {"kind": "ratio", "of": "student", "specialists": {"look": "teacher"}, "at_least": 0}
UNEVEN = {"kind": "uneven", "of": "student", "specialists": {"look": "teacher", "text": "teacher"}, "at_least": 0}
DIFFERENCE = {"kind": "difference", "of": "student", "to": ["base"], "at_least": 0}
TEST = "hypotheses.H1.tests.0"


def changed(place: str, value: Any) -> dict[str, Any]:
    """A protocol of every kind of arm that runs, but for one of its keys."""
    data = copy.deepcopy(tiny())
    *parents, last = place.split("/")
    section: Any = data
    for parent in parents:
        section = section[int(parent) if isinstance(section, list) else parent]
    section[int(last) if isinstance(section, list) else last] = value
    return data


def refused(tmp_path: Path, data: Any) -> str:
    path, out = written(tmp_path, data), tmp_path / "out"
    with pytest.raises(ConfigError) as error:
        compare(path, out=out)
    told = str(error.value)
    assert told.startswith(f"{path}: ")
    assert "\n" not in told
    assert "Value error" not in told
    assert not out.exists()
    return told.removeprefix(f"{path}: ")


FIRST = "hypotheses/H1/tests/0"
WRONG = [
    (f"{FIRST}/to", [], f"{TEST}: kind: difference needs to, without which it tests nothing"),
    (FIRST, RATIO | {"specialists": {}}, f"{TEST}: kind: ratio needs specialists"),
    (FIRST, RATIO | {"to": ["base"]}, f"{TEST}: kind: ratio takes no to; it takes kind, of, specialists, at_least"),
    (FIRST, RATIO | {"score": "look"}, f"{TEST}: kind: ratio takes no score"),
    (FIRST, UNEVEN, f"{TEST}: kind: uneven needs easiest"),
    (FIRST, UNEVEN | {"easiest": "look"}, f"{TEST}: kind: uneven needs base"),
    (FIRST, UNEVEN | {"easiest": "lok", "base": "base"}, "no task 'lok' among specialists; known: look, text"),
    (FIRST, UNEVEN | {"easiest": "look", "base": "base"}, f"{TEST}: no judged task 'text'; known: look"),
    (FIRST, DIFFERENCE | {"score": "lok"}, f"{TEST}: no judged task 'lok'; known: look, average"),
    (f"{FIRST}/of", "stutent", f"{TEST}: no arm 'stutent'; known: base, teacher, student, merged, router"),
    ("hypotheses/H1/tests", [], "hypotheses.H1.tests: expected at least one, got []"),
    ("name", "../up", "name: expected lower-case letters, digits and _, got '../up'"),
    ("seeds", [0, 0], "seeds: 0, 0 has a seed twice"),
    ("seeds", [-1], "seeds.0: Input should be greater than or equal to 0, got -1"),
    ("tuning/rates", [0.0], "tuning.rates.0: Input should be greater than 0, got 0.0"),
    ("tuning/rates", [float("inf")], "tuning.rates.0: Input should be a finite number, got inf"),
    ("tuning/rates", [1e-3, 1e-3], "tuning.rates: 0.001, 0.001 has a rate twice"),
    ("tuning/prompts", {"text": "world/text/train"}, "tuning.prompts has no look"),
    ("tuning", 3, "tuning: expected a mapping of its keys, got 3"),
    ("judged/averaged", [], "judged.averaged: expected at least one"),
    ("judged/averaged", ["text"], "judged: averaged: no judged task 'text'; known: look"),
    ("judged/rewards", {}, "judged: rewards.look: missing"),
    ("judged/rewards/text", ["text"], "judged: rewards.text: no judged task"),
    ("judged/varied", 5, "judged: varied 5 is more than images_per_task 4"),
    ("copies", {"../up": "world/look/train"}, "copies: task '../up' names files"),
    ("set/seed", 3, "set.seed: the protocol says it (seeds); take it out"),
    ("set/student.lora.start", "{teacher}", "set: {teacher} names no arm with a folder"),
    ("arms/student/set/rounds", 3, "arms.student.set.rounds: the protocol says it (rounds of the arm)"),
    ("arms/student/set/recorded", "{Teacher}", "arms.student.set: {Teacher} names no arm with a folder that stands"),
    ("arms/student/set/recorded", "{base}", "there are {teacher}, and {prompts} of copies"),
    ("arms/student/set/recorded", "{prompts}/a.txt", "{prompts} is the folder of copies, and there are none"),
    ("arms/teacher/curve", 5, "arms.teacher: curve 5 is more points than rounds 4"),
    ("arms/merged/curve", 1, "arms.merged: do: merge takes no curve; it takes of, merge"),
    ("arms/merged/of", ["teacher"], "arms.merged: of: do: merge needs two arms or more, got teacher"),
    ("arms/merged/of", ["teacher", "base"], "arms.merged: base is do: base; merge takes arms that are merge or train"),
    ("arms/merged/merge", {"method": "tie"}, "arms.merged.merge.method: Input should be 'mean' or 'ties', got 'tie'"),
    ("arms/merged/merge", {"scale": 0}, "arms.merged.merge.scale: expected a number other than 0, got 0"),
    ("arms/merged/merge", {"density": 2}, "arms.merged.merge.density: Input should be less than or equal to 1, got 2"),
    ("arms/merged/merge", {"densty": 1}, "arms.merged.merge: unknown key 'densty' (did you mean 'density'?)"),
    ("arms/router/by_task", {"text": "teacher"}, "arms.router.by_task has text; give an arm for each judged task"),
    # What needs files, models or plugins to be seen.
    ("judged/model", "nowhere/at_all", "judged.model: "),
    ("judged/truth", "opd_ray.world.samples:illustration", "judged.truth 'opd_ray.world.samples:illustration': "),
    ("judged/rewards/look", ["lok"], "judged.rewards.look: reward 'lok' is unknown. Known: "),
    ("judged/prompts/look", "nowhere.txt", "judged.prompts.look: nowhere.txt: "),
    ("judged/images_per_task", 100_000, "prompts, and judged.images_per_task is 100000; lower it, or give more"),
    ("judged/curve_images", 100_000, "prompts, and judged.curve_images is 100000; lower it, or give more"),
    ("copies", {"look_2": "nowhere.txt"}, "copies.look_2: nowhere.txt: "),
    ("arms/student/set/prompts", {"train": {"look": "nowhere.txt"}}, "arms.student: prompts.train: nowhere.txt: "),
    ("arms/teacher/set/batch", {"images_per_task": 4, "item_size": 4}, "arms.teacher: algorithm diffusion_nft"),
    ("arms/teacher/set/rewards", {"lok": {}}, "arms.teacher: reward 'lok' is unknown"),
    ("arms/student/set/algorithm.nois_level", 0.7, "nois_level"),
]


@pytest.mark.parametrize(("place", "value", "told"), WRONG, ids=[f"{one[0]}-{n}" for n, one in enumerate(WRONG)])
def test_a_wrong_protocol_is_refused_before_anything_is_made(tmp_path: Path, place: str, value: Any, told: str) -> None:
    assert told in refused(tmp_path, changed(place, value))


def test_the_trials_have_enough_prompts(tmp_path: Path) -> None:
    data = changed("tuning/rates", [1e-3, 4e-3])
    data["tuning"]["images_per_task"] = 100_000
    assert "tuning.prompts.look: " in (told := refused(tmp_path, data))
    assert "tuning.images_per_task is 100000" in told


def test_what_is_no_protocol_is_refused_with_the_files_name_once(tmp_path: Path) -> None:
    path = tmp_path / "protocol.yaml"
    path.write_text("name: a\nseeds: [0\n")
    with pytest.raises(ConfigError) as error:
        read_protocol(path)
    assert str(error.value).count(str(path)) == 1
    assert "line 3" in str(error.value)
    assert "string" not in str(error.value)
    assert refused(tmp_path, [1]).startswith("expected a mapping with name, seeds, tuning")


def test_a_hypothesis_without_findings_does_not_hold() -> None:
    assert Verdict("H", "so", ()).verdict == "undecided"


@pytest.mark.parametrize("path", [COMMITTED, AFTERWARDS], ids=["protocol", "full_trials"])
def test_the_committed_protocols_pass(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(COMMITTED.parent)
    check(read_protocol(path)[0], Place(tmp_path / "out"), path)


def test_what_a_protocol_calls_things_does_not_break_a_table(tmp_path: Path) -> None:
    """A pipe, a line break and a tag stay within their cell."""
    data = changed("arms", {"base": {"do": "base", "group": "a <b>", "says": "one | two\n<i>three"}})
    data["hypotheses"] = {"H|1": {"says": "x | y", "tests": [DIFFERENCE | {"of": "base"}]}}
    protocol, sha256 = read_protocol(written(tmp_path, data))
    place = Place(tmp_path)
    score = {"scores": {"look": [0.5, 0.5]}, "diversity": {"look": {"value": 0.1, "drawn": [0.1]}}}
    (tmp_path / "judged").mkdir()
    write_json_atomic(tmp_path / "judged" / "base.json", score)
    write_tables(gather(protocol, sha256, place), tmp_path, {})
    page = (tmp_path / "comparison.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| **base**"))
    assert row.startswith(r"| **base** one \| two &lt;i&gt;three | 0.500")
    (verdict,) = (line for line in page.splitlines() if line.startswith(r"| **H\|1** x \| y | **holds** |"))
    assert len(re.findall(r"(?<!\\)\|", verdict)) == 7
    assert "## a &lt;b&gt;" in page
