"""Ray's own reasons for a worker's end, told by name."""

import os
import subprocess
import sys

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError

from opd_ray.errors import WorkerLostError
from opd_ray.runtime.cluster import classify
from tests.runtime.runs import bare_environment

EATER = """
import numpy as np
from opd_ray.errors import WorkerLostError
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.handle import Done, WorkerSpec


class Eater:
    def eat(self):
        eaten = []
        while True:
            eaten.append(np.ones(2**27, dtype=np.uint8))


backend = RayBackend(object_store_mb=100)
call = backend.start(WorkerSpec("eater", Eater, 1, {"cpu": 0}), "eater").call("eat", bulk=0)
while not backend.wait([call.done], 1.0):
    pass
try:
    backend.result(call.done)
except WorkerLostError as error:
    print(error)
backend.close()
"""


def died_with(reason):
    context = ActorDiedErrorContext(
        actor_id=bytes(16), error_message="The actor died because its node has died.", node_ip_address="10.0.0.1"
    )
    context.node_death_info.reason = reason
    context.node_death_info.reason_message = "spot instance goes in 30 s"
    return ActorDiedError(context)


def test_a_preempted_node_is_told_by_name() -> None:
    told = classify(died_with(NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED))
    assert isinstance(told, WorkerLostError)
    assert str(told).startswith("its node was preempted: ActorDiedError: ")
    other = classify(died_with(NodeDeathInfo.UNEXPECTED_TERMINATION))
    assert isinstance(other, WorkerLostError)
    assert "preempted" not in str(other)


def test_an_end_for_lack_of_memory_is_told_by_name() -> None:
    told = classify(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert isinstance(told, WorkerLostError)
    assert str(told).startswith("Ray ended it, since its node had too little memory left: OutOfMemoryError: ")


@pytest.mark.verify
def test_a_worker_that_eats_all_memory_is_ended_by_ray_and_told_so() -> None:
    """Ray's own memory monitor, with a threshold 3 GB above what is used now."""
    from ray._private.utils import get_system_memory, get_used_memory

    threshold = (get_used_memory() + 3e9) / get_system_memory()
    if threshold > 0.9:
        pytest.skip("this machine has no 3 GB to spare")
    monitor = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run(
        [sys.executable, "-c", EATER],
        capture_output=True,
        text=True,
        timeout=120,
        env=bare_environment() | monitor | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.startswith("Ray ended it, since its node had too little memory left: "), (
        done.stdout + done.stderr
    )
