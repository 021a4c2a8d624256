"""The benchmarks of overlap, of the teacher pool and of the driver: in simulated time, and (verify) briefly on Ray."""

import gc
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from opd_ray.runtime.local import LocalBackend
from tests.runtime.fake import FakeBackend

FOLDER = Path(__file__).parent.parent / "benchmarks"
OURS = ("fixed_time", "line", "overlap", "teacher_pool")


@pytest.fixture
def modules(monkeypatch):
    """The benchmarks' modules by name, as they find each other when they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    found = {name: importlib.import_module(name) for name in OURS}
    monkeypatch.setattr(found["fixed_time"], "rest", lambda seconds: seconds)  # it passes in the backend alone
    yield found
    for name in OURS:
        del sys.modules[name]


def simulated(times):
    """A backend whose workers take these seconds."""
    seconds = {"draw": times.draw, "score": times.mark, "take": times.take, "update": times.update}
    return FakeBackend(seconds=seconds)


def splits(modules):
    return [(workers, items) for before, after, items in modules["overlap"].SPLITS for workers in (before, after)]


@pytest.mark.parametrize("number", range(10))
def test_without_any_cost_of_calls_every_split_meets_its_bound(modules, number) -> None:
    times = modules["overlap"].published(16.8)
    workers, items = splits(modules)[number]
    backend = simulated(times)
    line = modules["line"].Line(backend, workers, times, {"a": items}, clock=backend.clock)
    bound = max(workers.bounds(times, items).values())
    ahead = line.run(6, staleness=1)
    assert sum(ahead) / len(ahead) == pytest.approx(bound, rel=0.01)
    for seconds in line.run(6, staleness=0):
        assert seconds == pytest.approx(workers.alone(times, items), rel=0.01)


def test_the_bound_and_a_round_alone_are_what_a_reader_computes(modules) -> None:
    times = modules["line"].Times(draw=3.0, mark=2.0, take=1.0, update=0.5)
    workers = modules["line"].Workers(2, 1, 1)
    assert workers.bounds(times, 4) == {"rollout": 6.0, "teacher": 8.0, "learner": 4.5}
    # Two drawings end at 3 and two at 6; marks end at 5, 7, 9, 11; the last is learned at 12, then comes the update.
    assert workers.alone(times, 4) == 12.5


def test_a_shared_pool_serves_an_uneven_mix_faster(modules) -> None:
    bench = modules["teacher_pool"]
    backend = simulated(bench.TIMES)
    ours = bench.Ours(backend, bench.WORKERS, bench.TIMES, bench.UNEVEN, clock=backend.clock)
    ours.marking()
    other = simulated(bench.TIMES)
    static = bench.Static(other, bench.UNEVEN, clock=other.clock)
    _, marking = static.run(3)
    assert marking == pytest.approx([16 * bench.TIMES.mark] * 2), "32 items for a teacher with two workers"
    assert ours.marking() == pytest.approx(7 * bench.TIMES.mark), "40 items for six workers"


def test_a_killed_worker_costs_an_answer_and_not_the_run(modules) -> None:
    bench = modules["teacher_pool"]
    backend = simulated(bench.TIMES)
    ours = bench.Ours(backend, bench.WORKERS, bench.TIMES, bench.EVEN, clock=backend.clock)
    ours.kill_in = 2
    ours.run(5, staleness=1)
    assert ours.answered == 5 * ours.items
    assert len(ours.teacher.lost) == 1


def test_nothing_is_left_of_rounds_that_are_over(modules) -> None:
    bench = modules["line"]
    line = bench.Line(LocalBackend(), bench.Workers(2, 1, 1), bench.Times(0.0, 0.0, 0.0), {"a": 4, "b": 2})

    def ours():
        gc.collect()
        kinds = [type(one) for one in gc.get_objects()]
        return Counter(kind.__name__ for kind in kinds if str(kind.__module__).startswith("opd_ray"))

    line.run(4, staleness=1)
    before = ours()
    line.run(30, staleness=1)
    assert ours() == before


def bench(name, *args):
    command = [sys.executable, FOLDER / f"{name}.py", *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


@pytest.mark.ray
@pytest.mark.verify
def test_less_than_two_kilobytes_a_sample_go_through_the_driver() -> None:
    found = re.search(r"([\d.]+) KB a sample", bench("driver", "--rounds", "20", "--every", "10"))
    assert found is not None and 0.5 < float(found[1]) < 2


@pytest.mark.ray
@pytest.mark.verify
def test_a_published_step_is_its_update_on_ray() -> None:
    text = bench("overlap", "published", "--scales", "0.1", "--rounds", "5", "--repeats", "1")
    ratios = [float(line.split("|")[5].split()[0]) for line in text.splitlines() if "| 1 |" in line]
    assert len(ratios) == 2 and max(ratios) < 1.15, text
