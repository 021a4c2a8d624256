"""The command in a process of its own, with a Ray of its own: exit codes, addresses, and what it leaves behind."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from opd_ray.storage import checkpoint
from opd_ray.storage.run_folder import read_json
from tests.runtime.runs import LOOPBACK, alive, bare_environment, go, same

pytestmark = pytest.mark.ray

PLAIN = """
import ray
from opd_ray import cli

try:
    cli.main()
finally:
    print("Ray is up" if ray.is_initialized() else "Ray is down")
"""

# A learner that is killed in its second round, once too often; before that, everybody who listens is written down.
KILLED = """
import json, os, signal
from pathlib import Path
from opd_ray import build, cli, run as runs

runs.MAX_REBUILDS = 0
original = build._wire


def wire(*args):
    from tests.runtime.runs import descendants, listeners, pid_of

    run = original(*args)
    begin, pid = run.learner.begin, pid_of(run.learner.ranks[0])

    def beginning(items):
        if run.round == 1:
            mine = descendants(os.getpid())
            seen = {p: listeners(p) for p in [os.getpid(), *mine]}
            Path(os.environ["SEEN"]).write_text(json.dumps({"pids": mine, "seen": seen}))
            os.kill(pid, signal.SIGKILL)
        begin(items)

    run.learner.begin = beginning
    return run


build._wire = wire
cli.main()
"""


@pytest.fixture
def command(make_config, tmp_path):
    def run(script, *overrides):
        config = make_config("ray", cluster={"share_teachers": True})
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return subprocess.run(
            [sys.executable, "-c", script, "train", str(path), "--out", str(tmp_path), *overrides],
            capture_output=True,
            text=True,
            timeout=200,
            env=bare_environment() | {"SEEN": str(tmp_path / "seen.json")},
        )

    return run


@pytest.mark.verify
def test_a_learner_that_is_killed_too_often_is_exit_code_3_and_can_be_resumed(
    command, make_config, reference, tmp_path
) -> None:
    """Nothing of it is left, nothing of it listened in public, and it goes on somewhere else."""
    done = command(KILLED)
    assert done.returncode == 3, done.stderr
    assert re.search(r"stopped: taking round 1 \S+: learner rank 0( \(node [\d.]+, pid \d+\))? was lost", done.stderr)
    assert checkpoint.newest(tmp_path / "tiny")[0].round == 1
    assert read_json(tmp_path / "tiny" / "result.json")["status"] == "stopped"
    found = json.loads((tmp_path / "seen.json").read_text())
    assert len(found["pids"]) >= 6, "Ray's own processes, and three workers"
    assert not alive(found["pids"]), "Ray is shut down, since the run started it"
    loopback = {LOOPBACK}
    assert {pid: seen for pid, seen in found["seen"].items() if seen and set(seen) != loopback} == {}
    assert same(go(make_config(), tmp_path / "tiny", resume=True), reference(3))


@pytest.mark.verify
def test_too_many_workers_are_exit_code_2_in_one_line_and_nothing_is_left(command) -> None:
    done = command(PLAIN, "-o", "cluster.rollout.workers=400")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no room for 402 workers: asked {CPU: ") and "missing {CPU: " in last
    assert "Traceback" not in done.stderr
    assert done.stdout.strip().endswith("Ray is down")
