"""A node that goes takes its workers and what they had stored with it."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.runtime.runs import Outcome, same

pytestmark = [pytest.mark.ray, pytest.mark.verify]

SCRIPT = """
import json, os, sys
from pathlib import Path

from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 2, "include_dashboard": False})
far = cluster.add_node(num_cpus=1, resources={"far": 2}, **small)
os.environ["RAY_ADDRESS"] = cluster.address

from opd_ray.config import Config
from tests.runtime.runs import go


def watch(run, live):
    take, collect, jobs, taken = run.learner.take, run.source.collect, {}, []

    def taking(one):
        if run.round == 1:
            if len(taken) == int(sys.argv[2]):
                run.dispatcher.wait(jobs[1])  # all of the round is marked; this one and those after it are not taken
                cluster.add_node(num_cpus=1, resources={"far": 2}, **small)
                cluster.remove_node(far, allow_graceful=False)
            taken.append(one)
        take(one)

    def collecting(number, weights):
        batch = collect(number, weights)
        jobs[number] = batch.jobs
        return batch

    run.learner.take, run.source.collect = taking, collecting


folder = Path(sys.argv[1])
config = Config.model_validate_json((folder / "config.json").read_text())
try:
    done = go(config, folder / "run", watch=watch)
    (folder / "done.json").write_text(json.dumps({"rows": done.rows, "notes": done.notes, "result": done.result}))
finally:
    import ray

    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.parametrize("taken", [0, 2])
def test_what_was_drawn_and_marked_and_went_with_its_node_before_it_was_learned_from_is_made_again(
    make_config, reference, taken, tmp_path
) -> None:
    """Before the learner takes anything of the round, and after it took two of its four items."""
    far = {"resources": {"far": 1.0}}
    config = make_config("ray", cluster={"share_teachers": True, "rollout": far, "teachers": {"default": far}})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(taken)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    done = Outcome(pids=[], **json.loads((tmp_path / "done.json").read_text()))
    notes = " ".join(done.notes)
    assert "an input of the learner is gone" in notes, notes
    for role in ("rollout", "teacher"):
        assert re.search(rf"{role}-0 \(node [\d.]+, pid \d+\) was lost .*; last heartbeat \d+ s before", notes), notes
    drawn, once = (rows[1]["forwards"]["rollout"] for rows in (done.rows, reference(3).rows))
    assert drawn == 2 * once if taken == 0 else once < drawn <= 2 * once, "what was taken is not drawn again"
    for row, other in zip(done.rows, reference(3).rows, strict=True):
        row["forwards"] = other["forwards"]
    assert same(done, reference(3))
