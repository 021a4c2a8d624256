"""What a comparison has come to so far: rows, costs, verdicts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_ray.comparison.nodes import Place, key_of, needs_of, plan, rate_of, trial_key
from opd_ray.comparison.protocol import AVERAGE, Protocol
from opd_ray.comparison.verdicts import Scores, Verdict, decide
from opd_ray.storage.run_folder import read_json

__all__ = ["Cost", "Results", "Row", "gather"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of an arm with one seed. What it needed (specialists, recordings) counts in three ways; trials do not count."""

    images: float
    """That it drew to learn from."""
    images_in_all: float
    """With those that made what it needed."""
    forwards: float
    """Of its own, by all roles, one a picture."""
    free: float
    """Core-seconds of its own training, with whatever it needs for nothing."""
    parallel: float
    """With the longest chain of those that it needs, which are made at the same time."""
    serial: float
    """With all of them one after another."""


@dataclass(frozen=True, slots=True)
class Row:
    """An arm: means over seeds, and each seed's own."""

    name: str
    says: str
    group: str
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """Task or average -> a mean for each seed."""
    fidelity: tuple[dict[str, float], ...]
    diversity: tuple[dict[str, float], ...]
    costs: tuple[Cost, ...]
    rate: float | None
    curves: tuple[list[dict[str, Any]], ...]

    def on_the_way(self) -> list[dict[str, float]]:
        """At each point of the curves, `images` and the means over seeds of every task, and of fidelity if known."""
        found = list[dict[str, float]]()
        for points in zip(*self.curves, strict=False):
            means = {task: [np.nanmean(point["scores"][task]) for point in points] for task in points[0]["scores"]}
            if "fidelity" in points[0]:
                means["fidelity"] = [point["fidelity"]["value"] for point in points]
            found.append({"images": points[0]["images"]} | {name: float(np.mean(own)) for name, own in means.items()})
        return found


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that tables are made of."""

    protocol: Protocol
    sha256: str
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    trials: dict[str, dict[str, float]]
    """Arm -> learning rate -> average at the prompts of tuning."""
    cosines: dict[str, dict[int, dict[str, dict[str, float]]]]
    """Arm -> seed -> start or end -> pair of tasks -> cosine."""
    done: int
    total: int


def gather(protocol: Protocol, sha256: str, place: Place) -> Results:
    """Read what is there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    cosines: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for name, arm in protocol.arms.items():
        for seed in protocol.seeds:
            if arm.do == "router":
                parts = {task: found.get(other, {}).get(seed) for task, other in arm.by_task.items()}
                if all(parts.values()):
                    scores = {task: part["scores"][task] for task, part in parts.items() if part}
                    found.setdefault(name, {})[seed] = {"scores": scores}
            elif arm.do == "cosines":
                if (file := place.out / "cosines" / f"{name}-s{seed}.json").is_file():
                    cosines.setdefault(name, {})[seed] = read_json(file)
            elif (file := place.out / "judged" / f"{key_of(protocol, name, seed)}.json").is_file():
                found.setdefault(name, {})[seed] = read_json(file)
    by_score = {arm: {seed: one["scores"] for seed, one in seeds.items()} for arm, seeds in found.items()}
    known = Scores(by_score, protocol.judged.averaged)
    nodes = plan(protocol)
    return Results(
        protocol,
        sha256,
        tuple(_row(protocol, name, seeds, place) for name, seeds in found.items()),
        tuple(decide(name, hypothesis, known) for name, hypothesis in protocol.hypotheses.items()),
        _trials(protocol, place),
        cosines,
        sum(place.done(node) for node in nodes),
        len(nodes),
    )


def _row(protocol: Protocol, name: str, found: Mapping[int, dict[str, Any]], place: Place) -> Row:
    arm, judged = protocol.arms[name], [*found.values()]
    means: dict[str, tuple[float, ...]] = {
        task: tuple(float(np.nanmean(one["scores"][task])) for one in judged) for task in judged[0]["scores"]
    }
    averaged = protocol.judged.averaged
    means[AVERAGE] = tuple(float(np.mean([means[task][place] for task in averaged])) for place in range(len(judged)))
    return Row(
        name,
        arm.says,
        arm.group,
        tuple(found),
        means,
        tuple(one["fidelity"] for one in judged if "fidelity" in one),
        tuple(one["diversity"] for one in judged if "diversity" in one),
        tuple(cost(protocol, name, seed, place) for seed in found),
        rate_of(protocol, name, place) if arm.do == "train" else None,
        tuple(one["curve"] for one in judged if one.get("curve")),
    )


def cost(protocol: Protocol, name: str, seed: int, place: Place) -> Cost:
    """What an arm took, and what it needed."""
    own = _own(protocol, name, seed, place)
    every = [_own(protocol, *one, place) for one in {(name, seed), *_before(protocol, name, seed)}]
    return Cost(
        own["images"],
        sum(one["images"] for one in every),
        sum(own["forwards"].values()),
        own["core_seconds"],
        _longest(protocol, name, seed, place),
        sum(one["core_seconds"] for one in every),
    )


def _own(protocol: Protocol, name: str, seed: int, place: Place) -> dict[str, Any]:
    file = place.cost(key_of(protocol, name, seed))
    return read_json(file) if file.is_file() else {"images": 0, "forwards": {}, "core_seconds": 0.0}


def _before(protocol: Protocol, name: str, seed: int) -> set[tuple[str, int]]:
    direct = needs_of(protocol, name, seed)
    return {*direct, *(one for need in direct for one in _before(protocol, *need))}


def _longest(protocol: Protocol, name: str, seed: int, place: Place) -> float:
    chains = (_longest(protocol, *need, place) for need in needs_of(protocol, name, seed))
    return float(_own(protocol, name, seed, place)["core_seconds"]) + max(chains, default=0.0)


def _trials(protocol: Protocol, place: Place) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, arm in protocol.arms.items():
        for rate in protocol.tuning.rates if arm.do == "train" and arm.rate_of is None else ():
            file = place.out / "trials" / f"{trial_key(name, rate)}.json"
            if file.is_file():
                found.setdefault(name, {})[f"{rate:g}"] = read_json(file)["average"]
    return found
