"""GenEval's rules against a second, plain reading of them, on every kind of row, and by hand where it is close."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_ray.errors import PromptError
from opd_ray.rewards.geneval_rules import (
    COLOURS,
    Demand,
    Found,
    Wanted,
    keep,
    official,
    partial,
    relations,
    strict,
)

FIELD = Path(__file__).parents[3] / "shared/data/geneval_test_metadata.jsonl"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OWN_ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "cat", "count": 1}]},
    *(
        {
            "tag": "counting",
            "include": [{"class": "cat", "count": n}],
            "exclude": [{"class": "cat", "count": n + 1}],
        }
        for n in (2, 3, 4)
    ),
    *({"tag": "colors", "include": [{"class": "cup", "count": 1, "color": colour}]} for colour in COLOURS),
    *(
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "kite", "count": 1, "position": [where, 0]}],
        }
        for where in OPPOSITE
    ),
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "vase", "count": 1, "color": "blue"}],
    },
    {  # more than the field's own rows hold: several, coloured and placed at once
        "tag": "made up",
        "include": [
            {"class": "cup", "count": 2, "color": "red"},
            {"class": "vase", "count": 3, "color": "blue", "position": ["above", 0]},
            {"class": "bowl", "count": 1, "position": ["left of", 1]},
        ],
        "exclude": [{"class": "cup", "count": 4}, {"class": "dog", "count": 1}],
    },
]
Seen = tuple[str, tuple[float, float, float, float], float, str]
"""Class, box, confidence, colour."""


def rows() -> list[dict[str, Any]]:
    if not FIELD.is_file():
        return OWN_ROWS
    return OWN_ROWS + [json.loads(line) for line in FIELD.read_text(encoding="utf-8").splitlines()]


# The second reading: one picture's list of objects, the rules one after the other, nothing shared with the code.


def counted(row: dict[str, Any], seen: list[Seen], name: str) -> list[Seen]:
    least = 0.9 if row["tag"] == "counting" else 0.3
    own = [one for one in seen if one[0] == name and one[2] > least]
    own.sort(key=lambda one: one[2], reverse=True)
    return own[:16]


def stands(one: Seen, other: Seen, where: str) -> bool:
    """The distance of the middles, a tenth of both sizes less, over the whole distance, is more than one half."""
    (al, at, ar, ab), (bl, bt, br, bb) = one[1], other[1]
    dx, dy = (al + ar) / 2 - (bl + br) / 2, (at + ab) / 2 - (bt + bb) / 2
    kept_x = max(0.0, abs(dx) - 0.1 * ((ar - al) + (br - bl)))
    kept_y = max(0.0, abs(dy) - 0.1 * ((ab - at) + (bb - bt)))
    if kept_x < 0.001 and kept_y < 0.001:
        return False
    whole = math.hypot(dx, dy)
    if where in ("left of", "right of"):
        return kept_x / whole > 0.5 and (dx < 0) == (where == "left of")
    return kept_y / whole > 0.5 and (dy < 0) == (where == "above")


def second_reading(row: dict[str, Any], seen: list[Seen]) -> tuple[float, float, float]:
    """Official, strict and partial."""
    answers = []
    marks: list[float] = []
    for exactly in (False, True):
        met: list[list[Seen]] = []
        right = True
        for demand in row["include"]:
            wanted = demand["count"]
            own = counted(row, seen, demand["class"])
            enough = len(own) == wanted if exactly else len(own) >= wanted
            if not exactly:
                own = own[:wanted]
            fine = enough
            if exactly:
                marks.append(1 - abs(len(own) - wanted) / wanted)
                if not enough and ("color" in demand or "position" in demand):
                    marks.append(0.0)
            if fine and "color" in demand:
                painted = sum(one[3] == demand["color"] for one in own)
                fine = painted == wanted
                if exactly:
                    marks.append(1 - abs(painted - wanted) / wanted)
            if fine and "position" in demand:
                where, target = demand["position"]
                fine = bool(met[target]) and all(stands(a, b, where) for a in own for b in met[target])
                if exactly:
                    marks.append(1.0 if fine else 0.0)
            met.append(own if fine else [])
            right = right and fine
        if not exactly:
            for demand in row.get("exclude", []):
                right = right and len(counted(row, seen, demand["class"])) < demand["count"]
        answers.append(float(right))
    return answers[0], answers[1], sum(marks) / len(marks)


def ours(row: dict[str, Any], seen: list[Seen]) -> tuple[float, float, float]:
    wanted = Wanted.of(row, "a prompt")
    assert wanted is not None
    colours: dict[Found, str] = {}
    objects: dict[str, list[Found]] = {}
    for name, box, confidence, colour in seen:
        one = Found(box, confidence)
        colours[one] = colour
        objects.setdefault(name, []).append(one)
    kept = keep(objects, wanted)

    def paint(name, found):
        assert all(one in objects[name] for one in found)
        return [colours[one] for one in found]

    return official(wanted, kept, paint), strict(wanted, kept, paint), partial(wanted, kept, paint)


def satisfying(row: dict[str, Any]) -> list[Seen]:
    """Objects that meet every demand, exactly: each demand's in a block of its own, in the direction asked for."""
    blocks: list[tuple[float, float]] = []
    seen: list[Seen] = []
    for i, demand in enumerate(row["include"]):
        x, y = 1000.0 * i, 700.0 * i
        if "position" in demand:
            where, target = demand["position"]
            (tx, ty), (sx, sy) = blocks[target], STEP[where]
            x, y = tx + 400 * sx, ty + 400 * sy
        blocks.append((x, y))
        for k in range(demand["count"]):
            box = (x + 12 * k, y + 12 * k, x + 12 * k + 10, y + 12 * k + 10)
            seen.append((demand["class"], box, 0.95 - 0.001 * k, demand.get("color", "black")))
    return seen


def violations(row: dict[str, Any]) -> Iterator[tuple[str, list[Seen]]]:
    """The same picture with each single condition broken in turn; the official answer to all of them is 0."""
    good = satisfying(row)
    for demand in row["include"]:
        own = [one for one in good if one[0] == demand["class"]]
        others = [one for one in good if one[0] != demand["class"]]
        yield "one too few", others + own[1:]
        unsure = 0.9 if row["tag"] == "counting" else 0.3
        yield "one not sure enough", [*others, *own[1:], (own[0][0], own[0][1], unsure, own[0][3])]
        if "color" in demand:
            wrong = COLOURS[(COLOURS.index(demand["color"]) + 1) % len(COLOURS)]
            yield "wrong colour", [*others, *own[:-1], (*own[-1][:3], wrong)]
        if "position" in demand:
            where, target = demand["position"]
            beside = [one for one in good if one[0] == row["include"][target]["class"]]
            sx, sy = STEP[where]
            moves = {
                "opposite side": (-800 * sx, -800 * sy),  # from 400 on this side to 400 on the other
                "to the side": (-400 * sx + 400 * sy, -400 * sy + 400 * sx),
                "on top of it": (-400 * sx, -400 * sy),
            }
            for name, (dx, dy) in moves.items():
                moved = [(n, (a + dx, b + dy, c + dx, d + dy), s, col) for n, (a, b, c, d), s, col in own]
                yield name, others + moved
            yield "no target", [one for one in good if one not in beside]
    for demand in row.get("exclude", []):
        there = sum(one[0] == demand["class"] for one in good)
        more = [
            (demand["class"], (50.0 * k, 9000, 50.0 * k + 5, 9005), 0.91, "black")
            for k in range(demand["count"] - there)
        ]
        yield "excluded", good + more


def test_every_row_met_and_broken_in_each_condition() -> None:
    checked = 0
    for row in rows():
        good = satisfying(row)
        assert ours(row, good) == second_reading(row, good) == (1.0, 1.0, 1.0), row
        for name, seen in violations(row):
            answer = ours(row, seen)
            assert answer == pytest.approx(second_reading(row, seen)), (name, row)
            assert answer[0] == 0.0, (name, row)
            # Too many of something counted is the only thing that components need not see.
            assert answer[2] < 1.0 or name == "excluded", (name, row)
            checked += 1
    assert checked >= 60
    if FIELD.is_file():
        assert len(rows()) - len(OWN_ROWS) == 2212


def test_more_than_asked_for_is_right_officially_and_wrong_strictly() -> None:
    for row in rows():
        for demand in row["include"]:
            extra = (demand["class"], (5000.0, 5000.0, 5010.0, 5010.0), 0.92, "none")
            seen = [*satisfying(row), extra]
            excluded = any(e["class"] == demand["class"] for e in row.get("exclude", ()))
            official_score, strict_score, partial_score = ours(row, seen)
            if row["tag"] != "made up":
                assert official_score == (0.0 if excluded else 1.0), row
            assert strict_score == 0.0
            assert partial_score < 1.0
            assert ours(row, seen) == pytest.approx(second_reading(row, seen))


def test_random_scenes_agree() -> None:
    generator = np.random.default_rng(0)
    answers = []
    everything = rows()
    for turn in range(3000):
        row = everything[turn % len(everything)]
        names = [demand["class"] for demand in row["include"]] + ["person"]
        wishes = [demand.get("color", "black") for demand in row["include"]] + ["white"]
        seen: list[Seen] = []
        for _ in range(generator.integers(0, 7)):
            i = generator.integers(len(names))
            left, top, width, height = generator.integers(0, 400, 4) / 4  # confidences and boxes tie
            colour = wishes[i] if generator.random() < 0.7 else "green"
            confidence = float(generator.choice([0.2, 0.3, 0.5, 0.9, 0.95, 0.99]))
            seen.append((names[i], (left, top, left + width + 1, top + height + 1), confidence, colour))
        answers.append(ours(row, seen))
        assert answers[-1] == pytest.approx(second_reading(row, seen)), (row, seen)
    assert sum(answer[0] for answer in answers) > 100  # of both kinds
    assert sum(answer[0] > answer[1] for answer in answers) > 20


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (100, 0, 110, 10), {"left of"}),  # dx = -100, less 2: -0.98
        ((100, 0, 110, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 100, 10, 110), {"above"}),
        ((0, 100, 10, 110), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (100, 100, 110, 110), {"left of", "above"}),  # both 98 / 141.4 = 0.69
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),  # equal: no distance, and no division by it
        ((0, 0, 100, 100), (15, 0, 115, 100), set()),  # dx = -15 within 0.1 * 200 = 20
        ((0, 0, 100, 100), (20, 0, 120, 100), set()),  # exactly the margin
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),  # (40 - 20) / 40 = 0.5 is not more than one half
        ((40, 0, 140, 100), (0, 0, 100, 100), set()),
        ((0, 0, 100, 100), (0, 40, 100, 140), set()),
        ((0, 40, 100, 140), (0, 0, 100, 100), set()),
        ((0, 0, 100, 100), (41, 0, 141, 100), {"left of"}),  # 21 / 41 = 0.512, while they overlap
        ((0, 0, 10, 100), (41, 0, 51, 100), {"left of"}),  # 0.1 * 20 = 2 across; heights do not count
        ((0, 0, 10, 10), (52, 90, 62, 100), {"above"}),  # 50 / 104 = 0.48 across, 88 / 104 = 0.85 down
        ((0, 0, 10, 10), (54, 90, 64, 100), {"above"}),  # 52 / 105 = 0.495
        ((0, 0, 10, 10), (56, 90, 66, 100), {"left of", "above"}),  # 54 / 106 = 0.509
    ],
)
def test_relations_by_hand(one, other, expected) -> None:
    assert relations(one, other) == expected


def found(*confidences: float) -> list[Found]:
    return [Found((20.0 * i, 0, 20.0 * i + 10, 10), confidence) for i, confidence in enumerate(confidences)]


def test_what_counts_by_hand() -> None:
    cats = found(0.3, 0.95, 0.301, 0.9, 0.95, 0.1)
    two = (Demand("cat", 2),)
    kept = keep({"cat": cats}, Wanted(two))["cat"]
    assert [cats.index(one) for one in kept] == [1, 4, 3, 2]  # more than 0.3; a tie as it came
    assert [cats.index(one) for one in keep({"cat": cats}, Wanted(two, counting=True))["cat"]] == [1, 4]
    many = found(*(0.31 + 0.01 * i for i in range(20)))
    assert [many.index(one) for one in keep({"cat": many}, Wanted(two))["cat"]] == list(range(19, 3, -1))  # 16 of 20


def painted(*colours: str):
    """The colours of the first, second, ... object asked about."""
    return lambda _, objects: colours[: len(objects)]


def test_official_looks_at_the_most_confident() -> None:
    red = Wanted((Demand("cup", 1, "red"),))
    cups = {"cup": found(0.9, 0.8)}
    assert official(red, cups, painted("red", "blue")) == 1
    assert official(red, cups, painted("blue", "red")) == 0
    assert strict(red, cups, painted("red", "red")) == 0  # two are there


def test_exclusion_by_hand() -> None:
    wanted = Wanted((Demand("cat", 2),), (Demand("cat", 3), Demand("dog", 1)))
    assert official(wanted, {"cat": found(0.9, 0.9)}, painted()) == 1
    assert official(wanted, {"cat": found(0.9, 0.9, 0.9)}, painted()) == 0
    assert official(wanted, {"cat": found(0.9, 0.9), "dog": found(0.9)}, painted()) == 0
    assert strict(wanted, {"cat": found(0.9, 0.9), "dog": found(0.9)}, painted()) == 1  # as in Flow-GRPO


@pytest.mark.parametrize(
    ("there", "colours", "expected"),
    [
        (2, ("red", "red"), 1.0),
        (2, ("red", "blue"), (1 + 1 / 2) / 2),
        (2, ("blue", "blue"), (1 + 0) / 2),
        (1, ("red",), (1 / 2 + 0) / 2),  # a wrong count gives 0 for the colour
        (3, ("red", "red", "red"), (1 / 2 + 0) / 2),
        (0, (), 0.0),
        (16, ("red",) * 16, (1 - 14 / 2 + 0) / 2),  # -3: below 0
    ],
)
def test_partial_by_hand(there, colours, expected) -> None:
    wanted = Wanted((Demand("cup", 2, "red"),))
    assert partial(wanted, {"cup": found(*(0.9,) * there)}, painted(*colours)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kite", "expected"),
    [
        ((100, 0, 110, 10), 1.0),
        ((-100, 0, -90, 10), 2 / 3),  # 1, 1 and 0 for the place; the reference's server answers 3 / 4
        (None, (1 + 0 + 0) / 3),
    ],
)
def test_a_wrong_position_gives_zero_and_nothing_else(kite, expected) -> None:
    wanted = Wanted((Demand("dog", 1), Demand("kite", 1, None, ("right of", 0))))
    objects = {"dog": [Found((0, 0, 10, 10), 0.9)], "kite": [Found(kite, 0.9)] if kite else []}
    assert partial(wanted, objects, painted()) == pytest.approx(expected)


def test_partial_without_the_target() -> None:
    wanted = Wanted((Demand("dog", 1), Demand("kite", 1, None, ("right of", 0))))
    objects = {"kite": [Found((100, 0, 110, 10), 0.9)]}
    assert partial(wanted, objects, painted()) == pytest.approx((0 + 1 + 0) / 3)
    assert official(wanted, objects, painted()) == 0


def test_rows_as_other_tools_store_them() -> None:
    row = OWN_ROWS[-1]
    plain = Wanted.of(row, "p")
    assert plain is not None
    assert plain.include[1] == Demand("vase", 3, "blue", ("above", 0))
    assert plain.names == {"cup", "vase", "bowl", "dog"}
    encoded = {**row, "include": json.dumps(row["include"]), "exclude": json.dumps(row["exclude"])}
    assert Wanted.of(encoded, "p") == plain
    filled = [{"color": None, "position": None, **entry} for entry in row["include"]]  # as Arrow fills columns up
    assert Wanted.of({**row, "include": filled}, "p") == plain
    for empty in ({}, {"include": None}, {"include": ""}, {"include": "null"}, {"include": []}):
        assert Wanted.of({"tag": "counting", **empty}, "p") is None
    bare = Wanted.of({"include": row["include"][:1], "exclude": None}, "p")
    assert bare == Wanted((Demand("cup", 2, "red"),))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"count": 1}, "no 'class'"),
        ({"class": "cup"}, "no 'count'"),
        ({"class": "cup", "count": 0}, "count is 0; it has to be a whole number from 1 on"),
        ({"class": "cup", "count": 2.7}, "count is 2.7; it has to be a whole number"),
        ({"class": "cup", "count": True}, "count is True; it has to be a whole number"),
        ({"class": "cup", "count": 1, "color": "mauve"}, "color 'mauve' is unknown; known: red, orange"),
        ({"class": "cup", "count": 1, "position": ["near", 0]}, "position 'near' is unknown; known: left of"),
        ({"class": "cup", "count": 1, "position": ["above", 1]}, r"points at include\[1\]; it has to be an earlier"),
        ({"class": "cup", "count": 1, "position": ["above", -1]}, r"points at include\[-1\]"),
        ({"class": "cup", "count": "many"}, "many"),
        ({"class": "cup", "count": 1, "position": ["above"]}, "index out of range"),
        ("cup", "indices must be integers"),
    ],
)
def test_rows_that_cannot_be_used_are_named(entry, said) -> None:
    with pytest.raises(PromptError, match=rf"the GenEval columns of prompt 'two cups' cannot be used: .*{said}"):
        Wanted.of({"include": [{"class": "dog", "count": 1}, entry]}, "two cups")


@pytest.mark.parametrize("include", ["{not json", '{"class": "cup"}', 7])
def test_columns_that_are_no_lists_are_refused(include) -> None:
    with pytest.raises(PromptError, match="cannot be used"):
        Wanted.of({"include": include}, "p")
