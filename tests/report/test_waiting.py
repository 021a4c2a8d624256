"""Who waits for whom: the bands are as high as the shares and as wide as the rounds, and what to change is said."""

import json
import re

import pytest

from opd_ray.report.advice import store_advice
from opd_ray.report.html import write_report
from opd_ray.report.run_folder import Round
from opd_ray.report.waiting import MOST_SLICES, shares, who_waits
from tests.report.run_folders import ATTACK, metrics_row, write_run


def row(index: int, seconds: float, **roles: dict) -> Round:
    return Round.read({"round": index, "seconds": {"round": seconds}, "roles": roles})


def use(workers: float, *times: float) -> dict:
    return {"workers": workers, **dict(zip(("busy", "transfer", "input", "output"), times, strict=True))}


def boxes(picture: str, style: str) -> list[tuple[float, ...]]:
    """Left, bottom, top and right of a style's rectangles, in thousandths of the width and percent of the height."""
    found = re.search(rf'<path class="{style}" d="([^"]+)"', picture)
    pieces = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)V", found[1]) if found else []
    return [tuple(map(float, piece)) for piece in pieces]


def test_shares_are_of_worker_seconds():
    assert shares([use(1, 1, 0, 1, 0), use(2, 3, 1, 0, 2)]) == {
        "busy": 4 / 8,
        "transfer": 1 / 8,
        "input": 1 / 8,
        "output": 2 / 8,
    }
    assert shares([]) == {} and shares([{"workers": 2.0}]) == {}


def test_a_band_is_as_wide_as_its_rounds_and_as_high_as_their_shares():
    rounds = [row(0, 1, learner=use(1, 0.5, 0.25, 0.25, 0)), row(1, 3, learner=use(1, 1.5, 0, 0, 1.5))]
    picture = who_waits(rounds)
    assert boxes(picture, "busy") == [(0, 100, 50, 250), (250, 100, 50, 1000)]
    assert boxes(picture, "transfer") == [(0, 50, 25, 250)]
    assert boxes(picture, "output") == [(250, 50, 0, 1000)]  # above it in the first round: the hatched background
    assert "round 2, 1.0 s to 4.0 s: busy 50 %, transfer 0 %, waiting for input 0 %, waiting for output 50 %" in picture
    assert "<polyline" not in picture and "<small>1 worker</small>" in picture


def test_workers_that_come_and_go_are_a_line_of_steps():
    rounds = [
        row(0, 1, rollout=use(1, 1, 0, 0, 0)),
        row(1, 1, rollout=use(2, 1, 0, 0, 1)),
        row(2, 1, other=use(1, 1, 0, 0, 0)),
    ]
    picture = who_waits(rounds)
    assert "<small>0 to 2 workers</small>" in picture
    assert 'class="step" points="0.0,53.0 333.3,53.0 333.3,6.0 666.7,6.0 666.7,100.0 1000.0,100.0"' in picture
    assert boxes(picture, "unknown") == [(666.7, 100, 0, 1000)]
    assert "round 3, 2.0 s to 3.0 s: no workers; workers 0" in picture


def test_a_long_run_is_drawn_in_few_pieces():
    rounds = [row(index, 1, learner=use(1, 1, 0, 0, 0)) for index in range(5000)]
    slices = boxes(who_waits(rounds), "busy")
    assert MOST_SLICES / 2 < len(slices) <= MOST_SLICES
    assert slices[0][0] == 0 and slices[-1][3] == 1000


@pytest.mark.parametrize("seconds", [{}, {"round": 0.0}])
def test_rounds_without_a_length_are_left_out(seconds):
    assert who_waits([Round.read({"round": 0, "seconds": seconds, "roles": {"learner": use(1, 1, 0, 0, 0)}})]) == ""


def test_older_rows_are_shown_as_before(tmp_path):
    run = write_run(tmp_path / "demo")
    rows = [metrics_row(index) for index in range(80)]
    for old in rows[:40]:
        del old["roles"], old["store"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = write_report(run).read_text()
    assert len(boxes(page.split("Who waits for whom")[1], "unknown")) == 40
    for old in rows[40:]:
        del old["roles"], old["store"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = write_report(run).read_text()
    assert "Who waits" not in page and "waiting for output" not in page and "object store" not in page
    assert "workers busy on average" in page


def test_names_are_text(tmp_path):
    run = write_run(tmp_path / "demo", rounds=0)
    one = metrics_row(0)
    one["roles"] = {f"teacher.{ATTACK}": use(1, 1, 0, 0, 0)}
    (run / "metrics.jsonl").write_text(json.dumps(one) + "\n")
    page = write_report(run).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def spilled(*amounts: float | None) -> list[Round]:
    return [
        Round.read({"round": index} | ({} if amount is None else {"store": {"used": 0, "spilled": amount}}))
        for index, amount in enumerate(amounts)
    ]


@pytest.mark.parametrize(
    ("amounts", "said"),
    [
        ((), ""),
        ((None, 0, 0), ""),
        ((0, 4e8, 1.2e9, 1.2e9), "spilled 1.2 GB"),
        ((1e9, None, 1e9, 2e8), "spilled 1.2 GB"),  # the last is of another Ray, after a resume
        ((3.2e8,), "spilled 320 MB"),
    ],
)
def test_what_was_spilled_is_advised_about(amounts, said):
    told = store_advice(spilled(*amounts))
    assert told == (
        f"the object store {said} to disk: lower cluster.max_staleness or batch.images_per_task, or give it more "
        "(cluster.object_store_mb)"
        if said
        else ""
    )


def test_a_staleness_of_zero_cannot_be_lowered():
    assert "lower batch.images_per_task, or give" in store_advice(spilled(1e9), max_staleness=0)


@pytest.mark.parametrize("advice", [None, 7, "text", [], [ATTACK, ATTACK, 3]])
def test_advice_is_shown_as_text_and_once(tmp_path, advice):
    run = write_run(tmp_path / "demo", rounds=1)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"advice": advice}))
    page = write_report(run).read_text()
    shown = re.findall("<li>(.*?)</li>", page.split("Where the time went")[1].split("<p")[0])
    assert len(shown) == (2 if isinstance(advice, list) and advice else 0)
    assert "<script>alert" not in page
