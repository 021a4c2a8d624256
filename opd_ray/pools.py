"""One way from a placement to workers, for runs and evaluations alike."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_ray.config import ClusterConfig, Placement, RewardPlacement, RolePlacement
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.runtime.pool import Pool
from opd_ray.storage.run_folder import write_atomic

__all__ = ["make_pool", "new_nonce", "worker_spec"]

NONCE = ".nonce-"
"""Beginning of the name of a file in the folder, new with each start: workers that find it see the same folder."""
STACK_AFTER = 0.75
"""Part of the heartbeat's timeout after which a wedged worker writes its stacks into its log."""


def new_nonce(folder: Path) -> None:
    """A file that no worker has looked for before, so that no cache can know that it is not there."""
    for old in folder.glob(f"{NONCE}*"):
        old.unlink(missing_ok=True)
    name = uuid.uuid4().hex
    write_atomic(folder / f"{NONCE}{name}", name.encode())


def worker_spec(
    cluster: ClusterConfig,
    folder: Path,
    role: str,
    placement: Placement,
    factory: Callable[[], Any],
    *,
    home: bool = False,
) -> WorkerSpec:
    """What one worker of a role needs.

    Args:
        cluster: where the run or the evaluation is placed.
        folder: its own, with a nonce (``new_nonce``).
        role: name, also of the logs.
        placement: of the role.
        factory: makes the worker's host, in its process.
        home: on the driver's node.
    """
    return WorkerSpec(
        role,
        factory,
        placement.threads,
        dict(placement.resources),
        folder / "logs",
        nonce=next((path, path.read_text()) for path in folder.glob(f"{NONCE}*")),
        ship=cluster.storage == "ship",
        stack_after_s=STACK_AFTER * cluster.heartbeat_timeout_s,
        home=home,
        runtime_env=placement.runtime_env if isinstance(placement, RewardPlacement) else {},
    )


def make_pool(
    dispatcher: Dispatcher,
    cluster: ClusterConfig,
    folder: Path,
    role: str,
    placement: RolePlacement,
    factory: Callable[[], Any],
    teachers: tuple[str, ...] = (),
    *,
    home: bool = False,
) -> Pool:
    """Workers of a role, known to the dispatcher; the arguments as of ``worker_spec``, and ``teachers`` of ``Pool``."""
    own_deadline_s = placement.deadline_s if isinstance(placement, RewardPlacement) else None
    made = Pool(
        dispatcher.backend,
        worker_spec(cluster, folder, role, placement, factory, home=home),
        placement.workers,
        clock=time.monotonic,
        start_timeout_s=cluster.start_timeout_s,
        call_timeout_s=own_deadline_s or cluster.call_timeout_s,
        beat_timeout_s=cluster.heartbeat_timeout_s,
        teachers=teachers,
    )
    dispatcher.pools.append(made)
    return made
