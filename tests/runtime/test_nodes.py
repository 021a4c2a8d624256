"""Several nodes, of which some have a disk of their own where the driver's run folder is.

A node of its own is a raylet in a mount namespace of its own, in which an empty file system covers the run folder; that
needs the right to mount.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.runs import Outcome, bare_environment, same

pytestmark = pytest.mark.ray

SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

folder, moves = Path(sys.argv[1]), sys.argv[2] == "moves"
small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 2, "include_dashboard": False})
os.environ["RAY_ADDRESS"] = cluster.address
ray.init(log_to_driver=False)
own = []


def own_disk(resource):
    \"\"\"Start a node that sees an empty folder where the run folders are.\"\"\"
    start = f"ray start --address={cluster.address} --num-cpus=1 --object-store-memory={80 * 2**20} --block"
    mount = f"mount -t tmpfs tmpfs {folder / 'runs'} && exec {start} --resources='{json.dumps({resource: 4})}'"
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", mount]
    before = ray.cluster_resources().get(resource, 0)
    node = subprocess.Popen(command, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    own.append(node)
    while ray.cluster_resources().get(resource, 0) == before:
        assert node.poll() is None, "the node did not start"
        time.sleep(0.2)
    return node


student = cluster.add_node(num_cpus=1, resources={"student": 4}, **small)
first = own_disk("teacher_node")

from opd_ray.config import Config
from opd_ray.errors import UserError
from tests.runtime.runs import go


def watch(run, live):
    def after():
        if moves and run.round == 1:  # one joins late
            own_disk("teacher_node")
        if moves and run.round == 2 and first.poll() is None:  # and one leaves, with what it had
            first.kill()
            first.wait()

    live.after_round = after


config = Config.model_validate_json((folder / "config.json").read_text())
told = {}
try:
    for resume in json.loads(sys.argv[3]):
        done = go(config, folder / "runs" / "run", resume=resume, watch=watch)
        told = {"rows": done.rows, "notes": done.notes, "result": done.result}
except UserError as error:
    told = {"refused": str(error), "code": error.exit_code}
finally:
    (folder / "done.json").write_text(json.dumps(told))
    ray.shutdown()
    for node in own:
        node.kill()
    cluster.shutdown()
"""


def may_mount() -> bool:
    """Whether this process may make a node of its own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs the right to mount")


def on_nodes(config, folder: Path, *, moves=False, attempts=(False,)) -> dict:
    """What a driver on the head of a new cluster told."""
    (folder / "runs").mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    words = ["moves" if moves else "", json.dumps(attempts)]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *words],
        capture_output=True,
        text=True,
        timeout=400,
        env={k: v for k, v in bare_environment().items() if k != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
    )
    told = json.loads((folder / "done.json").read_text()) if (folder / "done.json").exists() else {}
    assert told, ended.stderr
    return told


def spread(make_config, storage, **changes):
    """The student on one node, teachers on others."""
    cluster = {
        "storage": storage,
        "share_teachers": True,
        "nodes_may_come": True,
        "rollout": {"resources": {"cpu": 0, "student": 1}},
        "learner": {"resources": {"cpu": 0, "student": 1}},
        "teachers": {"default": {"resources": {"cpu": 0.1, "teacher_node": 3}}},
    }
    return make_config("ray", cluster=cluster, **changes)


@needs_mounts
@pytest.mark.verify
def test_a_node_without_the_run_folder_is_named_and_the_run_refused(make_config, tmp_path) -> None:
    told = on_nodes(spread(make_config, "shared"), tmp_path / "cluster")
    assert told["code"] == 2
    assert told["refused"].startswith("node ")
    assert f"{tmp_path}/cluster/runs/run is not the run folder that the driver has" in told["refused"]
    assert told["refused"].endswith("or set cluster.storage: ship")


@needs_mounts
@pytest.mark.verify
def test_without_a_shared_disk_the_student_is_the_same_and_the_run_folder_whole(
    make_config, reference, tmp_path
) -> None:
    """One teacher node joins late and the other leaves; a second driver goes on from the last checkpoint."""
    config = spread(make_config, "ship", rounds=5)
    told = on_nodes(config, tmp_path / "cluster", moves=True, attempts=[False, True])
    assert "refused" not in told, told
    for row, other in zip(told["rows"], reference(5).rows, strict=True):
        row["forwards"] = other["forwards"]  # what was lost was done again
    assert same(Outcome(pids=[], error=None, **told), reference(5))
    run = tmp_path / "cluster" / "runs" / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name[0] != ".")
    assert (run / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 1000
    assert any("going on after round 5 of 5" in note for note in told["notes"])
    logs = {path.name for path in (run / "logs").iterdir()}
    assert "clerk-0.log" in logs and not any(name.startswith("teacher") for name in logs), "those stay on their node"
