"""Pairs through Ray Data: the same rows and the same student as in one process."""

from itertools import islice

import pytest
import ray

from opd_ray.config import PairsConfig
from opd_ray.errors import PromptError
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading
from tests.pairs import files
from tests.runtime.runs import Killer, go, same

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return files.parquet(tmp_path_factory.mktemp("pairs") / "a.parquet", 20, ties={1}, empty={3}, broken={4: b""})


def read(order, reading, position, count):
    """What a worker that has every CPU reads through Ray Data."""
    from opd_ray.runtime import datasets

    return list(islice(datasets.rows(order, reading, 2, position), count))


def test_rows_are_those_of_one_process_also_from_the_middle(ray_session, path):
    order = Order(index_pairs(PairsConfig(files=str(path))), 0, 6)
    reading = Reading(files.SIDE)
    worker = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(read)
    for position, count in ((0, 40), (23, 5)):
        found = ray.get(worker.remote(order, reading, position, count), timeout=120)
        assert found == list(islice(order.rows(reading, position), count))


def test_an_error_of_a_task_is_ours(ray_session, path):
    order = Order(index_pairs(PairsConfig(files=str(path))), 0, 6)
    with pytest.raises(PromptError, match=r"a.parquet row 5: jpg_0 is missing; mend it, or set pairs.on_bad: skip$"):
        read(order, Reading(files.SIDE, on_bad="stop"), 0, 20)


@pytest.mark.verify
def test_a_run_with_two_readers_of_which_one_is_killed_is_the_local_one(ray_session, make_config, path, tmp_path):
    sections = {
        "rounds": 3,
        "algorithm": {"name": "tests.pairs.test_runs:Winners"},
        "batch": {"images_per_task": 6, "item_size": 3},
        "teachers": {},
        "student": {"guidance": 1.0, "lora": {"rank": 4, "alpha": 8}},
        "prompts": None,
        "pairs": {"files": str(path), "window": 6, "max_bad": 0.5, "flip": True},
    }
    local = go(make_config(**sections), tmp_path / "local")
    cluster = {"rollout": {"workers": 2, "resources": {"cpu": 0.25}}}
    killers = []
    watch = lambda run, live: killers.append(Killer(run, {"reader": 1}))  # noqa: E731
    spread = go(make_config("ray", cluster=cluster, **sections), tmp_path / "ray", watch=watch)
    assert len(killers[0].killed) == 1 and same(spread, local)
    told = [[row["pairs"], row.get("broken_pairs")] for row in spread.rows]
    assert told == [[row["pairs"], row.get("broken_pairs")] for row in local.rows]
