"""A Ray that starts, answers through one worker, and ends."""

import os
import time

import ray

from opd_ray.errors import PlacementError, WorkerLostError
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.handle import Done, WorkerSpec

__all__ = ["try_ray"]


class Probe:
    """The smallest host."""

    def ready(self) -> Done:
        """The worker's process."""
        return Done(os.getpid(), 0.0, 0)


def try_ray(object_store_mb: int, timeout_s: float = 120) -> str:
    """Start Ray as a run does, or join the one of RAY_ADDRESS; returns what was seen.

    Raises:
        PlacementError: there is no room for one worker.
        WorkerLostError: Ray did not start, or the worker did not answer.
    """
    start, before = time.monotonic(), ray.is_initialized()
    try:
        backend = RayBackend(object_store_mb=object_store_mb)
    except (RuntimeError, OSError, ValueError) as error:
        if not before:
            ray.shutdown()  # what did start
        raise WorkerLostError(f"it did not start ({' '.join(str(error).split())})") from None
    try:
        spec = WorkerSpec("doctor", Probe, threads=1, resources={"cpu": 1})
        if lack := backend.shortage([spec]):
            raise PlacementError(lack)
        call = backend.start(spec, "doctor-0").call("ready", bulk=0)
        if not backend.wait([call.done], timeout_s):
            raise WorkerLostError(f"it started, and its worker did not answer within {timeout_s:g} s")
        if backend.result(call.done).value == os.getpid():
            raise WorkerLostError("its worker is this very process")
    except ray.exceptions.RayError as error:
        raise WorkerLostError(f"its worker failed ({' '.join(str(error).split())})") from None
    finally:
        backend.close()
    return f"one worker answered after {time.monotonic() - start:.0f} s"
