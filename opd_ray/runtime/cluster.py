"""Workers as plain Ray actors. Ray never restarts or retries anything here: the pool alone does."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import grpc
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.state import available_resources_per_node  # no public name without the dashboard
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from opd_ray.errors import ConfigError, InputLostError, PlacementError, Stopped, WorkerLostError
from opd_ray.runtime.handle import Call, Done, Handle, Ref, Store, WorkerSpec
from opd_ray.runtime.process import Process
from opd_ray.runtime.resources import amounts, ray_resources
from opd_ray.runtime.session import Session, apart

__all__ = ["RayBackend", "classify"]

RECORD_TIMEOUT_S = 30
"""A finished record is small; fetching it takes no longer than this."""
ENVIRONMENT = {
    # Returns under 100 KB would otherwise travel inside the reply, into the driver.
    "RAY_max_direct_call_object_size": "0",
    # Roles share cores on small machines: a spinning thread slows its neighbours 20 to 50 times.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}


class RayHandle:
    """One actor incarnation."""

    def __init__(self, actor: Any, name: str, living: "dict[RayHandle, None]") -> None:
        self.name = name
        self._actor, self._living = actor, living
        living[self] = None

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        """Start the method; nothing is fetched."""
        # The name is what `ps`, `top` and Ray's own lists of tasks show.
        remote = self._actor.call.options(num_returns=bulk + 1, name=f"{self.name}.{method}")
        results = remote.remote(method, *args)
        return Call((), results) if bulk == 0 else Call(tuple(results[:-1]), results[-1])

    def beat(self, *, stack: bool = False) -> Call:
        """Ask for a sign of life."""
        return Call((), self._actor.beat.remote(stack))

    def kill(self) -> None:
        """End the process at once."""
        self._living.pop(self, None)
        ray.kill(self._actor, no_restart=True)


def classify(error: BaseException) -> Exception | None:
    """Which of the three kinds a Ray error is: InputLostError, WorkerLostError, or None for the work's own.

    A lost input arrives alone, or as the cause of a task error that names the reader.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RayTaskError):  # also an instance of its cause's class, but its text is a traceback
            seen = seen.cause
        elif isinstance(seen, ObjectLostError | OwnerDiedError):
            return InputLostError(_first_line(seen))
        else:
            seen = seen.__cause__
    # A record that does not arrive was on a node that Ray does not know to be gone yet.
    if isinstance(error, RayActorError | WorkerCrashedError | NodeDiedError | OutOfMemoryError | GetTimeoutError):
        return WorkerLostError(_cause(error))
    return None


def _cause(error: BaseException) -> str:
    """Ray's own reason where it has one that a person can act on."""
    if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
        return f"Ray ended it, since its node had too little memory left: {_first_line(error)}"
    if getattr(error, "preempted", False):
        return f"its node was preempted: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


class RayBackend:
    """A Ray that is already there (a job, RAY_ADDRESS), or one of our own on this machine."""

    def __init__(self, *, object_store_mb: int) -> None:
        self._mine = not ray.is_initialized()
        self._groups: dict[Handle, PlacementGroup] = {}
        self._handles: dict[RayHandle, None] = {}
        self._session: Session | None = None
        if self._mine:
            self._connect(object_store_mb)
        self._spilled: int | None = None
        """Bytes that were spilled before this backend looked for the first time."""
        self._actor = ray.remote(concurrency_groups={"control": 1})(Process)

    def _connect(self, object_store_mb: int) -> None:
        """Ray's init replaces the handler of SIGTERM; whoever set one, for instance to stop in order, gets it back."""
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self._init(object_store_mb)
        except SystemExit:  # Ray's handler, while it was in place
            raise KeyboardInterrupt from None
        finally:
            if threading.current_thread() is threading.main_thread():  # nowhere else can it be set
                signal.signal(signal.SIGTERM, handler)

    def _init(self, object_store_mb: int) -> None:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
            return
        session = Session()
        try:
            with apart():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=object_store_mb * 2**20,
                    _temp_dir=str(session.folder),
                )
            session.watch()
            self._session = session
        finally:
            if self._session is None:
                session.remove()

    @cached_property
    def _home(self) -> str:
        """The driver's node."""
        return str(ray.get_runtime_context().get_node_id())

    @property
    def address(self) -> str:
        """Where other drivers join this Ray."""
        return str(ray.get_runtime_context().gcs_address)

    def start(self, spec: WorkerSpec, name: str) -> Handle:
        """Ask Ray for an actor; an actor that cannot be placed raises nothing, so its first call has a timeout."""
        actor = self._actor.options(**self._options(spec)).remote(spec, name, self._home)
        return RayHandle(actor, name, self._handles)

    def start_group(
        self, specs: Sequence[WorkerSpec], timeout_s: float, idle: Callable[[], None] = lambda: None
    ) -> list[Handle]:
        """Learner ranks in one anonymous placement group on one node, since they meet on its loopback address."""
        group = placement_group([ray_resources(spec.resources) for spec in specs], strategy="STRICT_PACK")
        deadline = time.monotonic() + timeout_s
        while not (placed := group.wait(timeout_seconds=1)) and time.monotonic() < deadline:
            idle()
        if not placed:
            remove_placement_group(group)
            lack = self.shortage(specs, free=True) or "no single node has room for all of its ranks"
            raise PlacementError(f"the learner was not placed in {timeout_s:.0f} s; {lack}")
        handles: list[Handle] = []
        for rank, spec in enumerate(specs):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = self._options(spec) | {"scheduling_strategy": strategy}
            name = f"{spec.role}-{rank}"
            handle = RayHandle(self._actor.options(**options).remote(spec, name, self._home), name, self._handles)
            self._groups[handle] = group
            handles.append(handle)
        return handles

    def end_group(self, handles: Sequence[Handle]) -> None:
        """Kill them and remove their placement group."""
        for handle in handles:
            handle.kill()
        for group in {self._groups.pop(handle) for handle in handles}:
            remove_placement_group(group)

    def _require_ray(self) -> None:
        if self._session is not None and (lost := self._session.lost()) is not None:
            raise Stopped(f"Ray's {lost} has ended; --resume goes on from the last checkpoint")

    def object_store(self) -> Store | None:
        """As the raylets say; None while one of them has just gone and Ray does not know it yet."""
        self._require_ray()
        try:
            stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
        except grpc.RpcError:
            return None
        nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
        if self._spilled is None:
            self._spilled = stats.spilled_bytes_total
        spilled = stats.spilled_bytes_total - self._spilled
        return Store(stats.object_store_bytes_used, spilled, int(min(nodes, default=0.0)))

    def shortage(self, specs: Sequence[WorkerSpec], *, free: bool = False) -> str | None:
        """Asked, free per node, missing. A worker needs all that it asks for on one node."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if free:
            nodes = list(available_resources_per_node().values())
        asked, missing, left = dict[str, float](), dict[str, float](), [dict(node) for node in nodes]
        for spec in specs:
            own = ray_resources(spec.resources)
            _add(asked, own)
            room = next((node for node in left if all(node.get(k, 0.0) >= v - 1e-6 for k, v in own.items())), None)
            _add(*((missing, own) if room is None else (room, {name: -amount for name, amount in own.items()})))
        if not missing:
            return None
        seen = [{name: amount for name, amount in node.items() if name in asked} for node in nodes]
        return (
            f"no room for {len(specs)} workers: asked {amounts(asked)}; {'free' if free else 'there is'} per node "
            f"{', '.join(amounts(node) for node in seen)}; missing {amounts(missing)}. "
            "Lower workers or their cpu, gpu, resources in the cluster file, or add nodes"
        )

    def wait(self, refs: Collection[Ref], timeout_s: float) -> list[Ref]:
        """Sleep until one is done, then take all that are.

        Raises:
            Stopped: a Ray of our own has ended under us; Ray itself would try for a minute, then end this process.
        """
        self._require_ray()
        if not refs:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready:
            return []
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)
        return list(ready)

    def result(self, ref: Ref) -> Done:
        """The record; a bulk result is never asked for here."""
        try:
            done = ray.get(ref, timeout=RECORD_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            if isinstance(error, RuntimeEnvSetupError):
                last = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
                raise ConfigError(
                    f"an environment cannot be made on its node: {last}. Mend runtime_env under cluster.rewards"
                ) from None
            known = classify(error)
            if known is not None:
                raise known from None
            if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
                raise error.cause from error
            raise
        assert isinstance(done, Done)
        return done

    def close(self) -> None:
        """End our workers by handle, then our own Ray, of which nothing stays."""
        lost = self._session is not None and self._session.lost() is not None
        try:
            for handle in [] if lost else list(self._handles):  # whom one asks for it may be the one that is lost
                handle.kill()
            for group in set() if lost else set(self._groups.values()):
                remove_placement_group(group)
            self._groups = {}
            if self._mine and ray.is_initialized():
                ray.shutdown()
        finally:
            if self._session is not None:
                self._session.remove()
                self._session = None

    def _options(self, spec: WorkerSpec) -> dict[str, Any]:
        environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(spec.threads)} | spec.environment
        if not spec.resources.get("gpu"):
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray 2.60 no longer hides the cards from it
        return {
            "num_cpus": spec.resources.get("cpu", 0),
            "num_gpus": spec.resources.get("gpu", 0),
            "resources": {k: v for k, v in spec.resources.items() if k not in {"cpu", "gpu"}},
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": spec.runtime_env | {"env_vars": environment | _resolved(spec)},
            **({"scheduling_strategy": NodeAffinitySchedulingStrategy(self._home, soft=False)} if spec.home else {}),
        }


def _resolved(spec: WorkerSpec) -> dict[str, str]:
    """Variables of its runtime_env, with `${NAME}` as it is here, so that no secret has to stand in a configuration.

    Raises:
        ConfigError: there is no such variable here.
    """
    found = {}
    for name, value in spec.runtime_env.get("env_vars", {}).items():
        found[name] = os.path.expandvars(str(value))
        if missing := re.search(r"\$\{\w+\}", found[name]):
            raise ConfigError(
                f"runtime_env.env_vars.{name} of {spec.role} names {missing[0]}, which is not set where the run "
                "starts; export it there"
            )
    return found


def _add(total: dict[str, float], more: dict[str, float]) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, 0.0) + amount
