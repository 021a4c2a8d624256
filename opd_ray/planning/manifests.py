"""Whether KubeRay's manifests and a configuration belong together: each role finds a group, and each group a role."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from opd_ray.config import Config
from opd_ray.errors import ConfigError
from opd_ray.planning.rates import reward_role, teacher_placements
from opd_ray.runtime.resources import amounts, ray_resources

__all__ = ["check_manifests"]

STANDARD = {"CPU", "GPU"}
EPSILON = 1e-6
MOST_NODES = 2**31 - 1
"""KubeRay's own default of ``maxReplicas``."""


@dataclass(frozen=True, slots=True)
class Group:
    """A worker group, or the head, as Ray's autoscaler sees it."""

    name: str
    offers: dict[str, float]
    """Of one node: CPU, GPU and custom resources."""
    most: int
    """Nodes that it may have."""

    @property
    def custom(self) -> set[str]:
        """Its resources beside CPU and GPU: which roles it is for."""
        return set(self.offers) - STANDARD

    def fits(self, demand: Mapping[str, float]) -> bool:
        """Whether one node of it has that much."""
        return all(self.offers.get(name, 0.0) >= amount - EPSILON for name, amount in demand.items())


@dataclass(frozen=True, slots=True)
class Demand:
    """What a role asks for."""

    role: str
    each: Mapping[str, float]
    """Of one node, for each of its workers; for the learner, of one node for all ranks."""
    most: int
    """So many times at most: workers, or one learner."""


def check_manifests(config: Config, text: str, where: str) -> str:
    """Compare every RayCluster in a stream of manifests, also those inside a RayJob, with a run's cluster section.

    Roles are those of the cluster section and the recipe's teachers, whether or not the recipe has rewards to score.

    Args:
        config: the run.
        text: YAML documents; others than RayCluster and RayJob are passed over.
        where: they come from, for errors.

    Returns:
        What was compared, in a few words.

    Raises:
        ConfigError: a group that no role uses, a role that no group can take, too few nodes, or no RayCluster.
    """
    demands, told = list(_demands(config)), []
    for name, spec in _clusters(text, where):
        try:
            head = _group(spec["headGroupSpec"], head=True)
            groups = [_group(one) for one in spec.get("workerGroupSpecs") or []]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{where}: {name} is no valid RayCluster spec ({type(error).__name__}: {error})"
            ) from None
        for demand in demands:
            _check_offered(demand, [head, *groups], f"{where}: {name}")
        for group in groups:
            _check_used(group, demands, f"{where}: {name}")
        _check_room(demands, [head, *groups], f"{where}: {name}")
        told.append(f"{len(groups)} groups of {name} for {len(demands)} roles")
    return ", ".join(told)


def _demands(config: Config) -> Iterator[Demand]:
    cluster = config.cluster
    ranks = cluster.learner.ranks  # on one node, since they meet there: ``RayBackend.start_group``
    yield Demand(
        "learner", {name: ranks * amount for name, amount in ray_resources(cluster.learner.resources).items()}, 1
    )
    elastic = {"rollout": cluster.rollout} | teacher_placements(config)
    elastic |= {
        reward_role(entry): cluster.of_reward(entry) for entry in cluster.panels(config.rewards) or ("default",)
    }
    for role, placement in elastic.items():
        yield Demand(
            role,
            ray_resources(placement.resources),
            placement.autoscale.max if placement.autoscale else placement.workers,
        )


def _clusters(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and name of each cluster, and its spec."""
    try:
        documents = [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    found = 0
    for document in documents:
        spec = document.get("spec") or {}
        if document.get("kind") == "RayJob":
            spec = spec.get("rayClusterSpec") or {}
        if document.get("kind") in {"RayCluster", "RayJob"} and spec:
            found += 1
            yield f"{document['kind']} {(document.get('metadata') or {}).get('name', 'without a name')}", spec
    if not found:
        raise ConfigError(
            f"{where}: no RayCluster, and no RayJob with a rayClusterSpec; give deploy/kuberay/base/cluster.yaml, or "
            "what `kubectl kustomize` prints"
        )


def _group(spec: Mapping[str, Any], *, head: bool = False) -> Group:
    """As KubeRay reads it: the first container's limits, unless the group says otherwise."""
    kubernetes = spec["template"]["spec"]["containers"][0].get("resources") or {}
    limits = (kubernetes.get("requests") or {}) | (kubernetes.get("limits") or {})
    parameters, own = spec.get("rayStartParams") or {}, spec.get("resources") or {}
    offers = {"CPU": float(math.ceil(_quantity(limits.get("cpu", 0))))}
    offers["GPU"] = sum(_quantity(amount) for name, amount in limits.items() if name.endswith("gpu"))
    offers |= {
        name: float(parameters[key]) for key, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")) if key in parameters
    }
    if "resources" in parameters:  # JSON in a shell's quotes
        offers |= json.loads(str(parameters["resources"]).strip("'\"").replace("\\", ""))
    offers |= {name: _quantity(amount) for name, amount in own.items() if name != "memory"}
    most = 1 if head else int(spec.get("maxReplicas", MOST_NODES)) * int(spec.get("numOfHosts", 1))
    return Group(
        "head" if head else spec["groupName"], {name: amount for name, amount in offers.items() if amount}, most
    )


def _quantity(amount: Any) -> float:
    """A count of Kubernetes; only CPU has parts, in thousandths."""
    text = str(amount)
    return float(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


def _check_used(group: Group, demands: Sequence[Demand], where: str) -> None:
    asked = sorted({name for demand in demands for name in demand.each} - STANDARD)
    if group.custom and not group.custom & set(asked):
        raise ConfigError(
            f"{where}: no role uses group {group.name!r}: none asks for {', '.join(sorted(group.custom))}; asked for: "
            f"{', '.join(asked) or 'no custom resource'}. Remove the group, or add its resource to a role of the "
            "cluster file"
        )
    if not any(group.fits(demand.each) and set(demand.each) & (group.custom or STANDARD) for demand in demands):
        raise ConfigError(
            f"{where}: no role uses group {group.name!r}: its nodes offer {amounts(group.offers)}, too little for "
            "each of them. Remove the group, or enlarge its limits"
        )


def _check_offered(demand: Demand, groups: Sequence[Group], where: str) -> None:
    if any(group.most and group.fits(demand.each) for group in groups):
        return
    offered = {name for group in groups for name in group.offers}
    lacking = ", ".join(sorted(set(demand.each) - offered))
    offers = "; ".join(f"{group.name} {amounts(group.offers)}" for group in groups)
    raise ConfigError(
        f"{where}: no group takes {demand.role}, which asks one node for {amounts(demand.each)}: "
        f"{f'nobody offers {lacking}' if lacking else 'no node has that much'} ({offers}). "
        "Add a group, or change the role's resources in the cluster file"
    )


def _check_room(demands: Sequence[Demand], groups: Sequence[Group], where: str) -> None:
    """Whether all fit at once, each at its most: first fit, as Ray packs them."""
    total = sum(demand.most for demand in demands)
    nodes = [replace(group, offers=dict(group.offers)) for group in groups for _ in range(min(group.most, total))]
    for demand in demands:
        for placed in range(demand.most):
            room = next((node for node in nodes if node.fits(demand.each)), None)
            if room is None:
                fitting = ", ".join(f"{group.name} {group.most}" for group in groups if group.fits(demand.each))
                raise ConfigError(
                    f"{where}: {demand.role} may have {demand.most} workers, and beside the other roles there is room "
                    f"for {placed} (maxReplicas: {fitting}). Raise maxReplicas, or lower workers or autoscale.max"
                )
            for name, amount in demand.each.items():
                room.offers[name] -= amount
