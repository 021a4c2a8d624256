"""What a comparison has come to so far: rows, costs, verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from opd_ray.comparison.hypotheses import AVERAGE
from opd_ray.comparison.nodes import Place, key_of, needs_of, plan, rate_of, trial_key
from opd_ray.comparison.protocol import Protocol
from opd_ray.comparison.verdicts import Scores, Verdict, decide
from opd_ray.evaluation.gauges import Gauge, mean_of
from opd_ray.metrics import rows
from opd_ray.storage.run_folder import read_json

__all__ = ["COSTS", "Cost", "Results", "Row", "gather"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of an arm with one seed, counted in three ways. Trials are in none of them."""

    free: float
    """Its own, with whatever it needs (specialists, recordings) for nothing."""
    parallel: float
    """With the longest chain of those that it needs, which are made at the same time."""
    serial: float
    """With all of them, one after another."""


COSTS = ("images", "forwards", "core_seconds")
"""Drawn to learn from; by all roles, one a picture; processor time."""
GAUGES = ("fidelity", "diversity", "pooled")

Booked = Mapping[str, Mapping[str, Any]]
"""Key of what was trained, recorded or merged -> what it took."""


@dataclass(frozen=True, slots=True)
class Row:
    """An arm: means over seeds, and each seed's own."""

    name: str
    says: str
    group: str
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """Task or average -> a mean for each seed."""
    gauges: dict[str, dict[str, tuple[Gauge, ...]]]
    """Fidelity, diversity or pooled -> task, or the average of all -> for each seed."""
    costs: dict[str, tuple[Cost, ...]]
    """One of ``COSTS`` -> for each seed."""
    rate: float | None
    curves: tuple[list[dict[str, Any]], ...]

    def on_the_way(self) -> list[dict[str, float]]:
        """Means over seeds at each point of the curves: `images`, `images in all`, every score, fidelity if known.

        `reward` is what the arm learned from since the point before, where it learned from rewards.
        """
        before = float(np.mean([cost.serial - cost.free for cost in self.costs["images"]]))
        found = list[dict[str, float]]()
        for points in zip(*self.curves, strict=False):
            means = {task: [np.nanmean(point["scores"][task]) for point in points] for task in points[0]["scores"]}
            if "reward" in points[0]:
                means["reward"] = [point["reward"] for point in points]
            if "fidelity" in points[0]:
                means["fidelity"] = [one["value"] for point in points for one in point["fidelity"].values()]
            images = {"images": points[0]["images"], "images in all": points[0]["images"] + before}
            found.append(images | {name: float(np.mean(own)) for name, own in means.items()})
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
    code: tuple[str, ...]
    """The states of the code that made it; `unknown` where that was not written down yet."""
    core_hours: float
    """Processor time of all that was trained, recorded and merged, trials too."""
    done: int
    total: int
    quick: bool
    """That shows only that all of it runs."""


def gather(protocol: Protocol, sha256: str, place: Place, *, quick: bool = False) -> Results:
    """Read what is there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    cosines: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for name, arm in protocol.arms.items():
        for seed in protocol.seeds:
            if arm.do == "router":
                parts = {task: found.get(other, {}).get(seed) for task, other in arm.by_task.items()}
                if all(parts.values()):
                    found.setdefault(name, {})[seed] = {
                        kind: {task: part[kind][task] for task, part in parts.items() if part}
                        for kind in ("scores", "fidelity", "diversity")
                        if all(part and kind in part for part in parts.values())
                    }
            elif arm.do == "cosines":
                if (file := place.out / "cosines" / f"{name}-s{seed}.json").is_file():
                    cosines.setdefault(name, {})[seed] = read_json(file)
            elif (file := place.out / "judged" / f"{key_of(protocol, name, seed)}.json").is_file():
                found.setdefault(name, {})[seed] = read_json(file)
    by_score = {arm: {seed: one["scores"] for seed, one in seeds.items()} for arm, seeds in found.items()}
    known = Scores(by_score, protocol.judged.averaged)
    nodes = plan(protocol)
    files = {node.key: place.cost(node.key) for node in nodes if node.kind in {"train", "record", "merge"}}
    booked = {key: read_json(file) for key, file in files.items() if file.is_file()}
    return Results(
        protocol,
        sha256,
        tuple(_row(protocol, name, seeds, booked, place) for name, seeds in found.items()),
        tuple(decide(name, hypothesis, known, protocol.seeds) for name, hypothesis in protocol.hypotheses.items()),
        _trials(protocol, place),
        cosines,
        tuple(sorted({state for one in booked.values() for state in one.get("code", ["unknown"])})),
        sum(one["core_seconds"] for one in booked.values()) / 3600,
        sum(place.done(node) for node in nodes),
        len(nodes),
        quick,
    )


def _row(protocol: Protocol, name: str, found: Mapping[int, dict[str, Any]], booked: Booked, place: Place) -> Row:
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
        {kind: _gauges([one[kind] for one in judged]) for kind in GAUGES if all(kind in one for one in judged)},
        {kind: tuple(cost(protocol, booked, kind, name, seed) for seed in found) for kind in COSTS},
        rate_of(protocol, name, place) if arm.do == "train" else None,
        tuple(_curve(one, place.work(key_of(protocol, name, seed))) for seed, one in found.items() if one.get("curve")),
    )


def _curve(told: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The points of one seed, with the mean of all rewards of the pictures that were drawn since the one before."""
    rewards = {row["round"]: fmean(row["scores"].values()) for row in rows(folder / "metrics.jsonl") if "scores" in row}
    points, before = list[dict[str, Any]](), 0
    for point in told["curve"]:
        since = [rewards[round] for round in range(before, point["round"]) if round in rewards]
        points.append(point | ({"reward": fmean(since)} if since else {}))
        before = point["round"]
    return points


def _gauges(told: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Gauge, ...]]:
    """Of each seed, by task and averaged over all of them; or of all tasks together."""
    if "value" in told[0]:
        return {AVERAGE: tuple(_gauge(one) for one in told)}
    by_task = {task: tuple(_gauge(one[task]) for one in told) for task in told[0]}
    return by_task | {AVERAGE: tuple(mean_of(of_seed) for of_seed in zip(*by_task.values(), strict=True))}


def _gauge(told: Mapping[str, Any]) -> Gauge:
    return Gauge(told["value"], tuple(told["drawn"]))


def cost(protocol: Protocol, booked: Booked, kind: str, name: str, seed: int) -> Cost:
    """What an arm took, and what it needed."""
    every = sorted({(name, seed), *_before(protocol, name, seed)})  # in one order: sums of floats depend on it
    return Cost(
        _own(protocol, booked, kind, name, seed),
        _longest(protocol, booked, kind, name, seed),
        sum(_own(protocol, booked, kind, *one) for one in every),
    )


def _own(protocol: Protocol, booked: Booked, kind: str, name: str, seed: int) -> float:
    key = key_of(protocol, name, seed)
    told = booked[key][kind] if key in booked else 0
    return float(sum(told.values()) if isinstance(told, dict) else told)


def _before(protocol: Protocol, name: str, seed: int) -> set[tuple[str, int]]:
    direct = needs_of(protocol, name, seed)
    return {*direct, *(one for need in direct for one in _before(protocol, *need))}


def _longest(protocol: Protocol, booked: Booked, kind: str, name: str, seed: int) -> float:
    chains = (_longest(protocol, booked, kind, *need) for need in needs_of(protocol, name, seed))
    return _own(protocol, booked, kind, name, seed) + max(chains, default=0.0)


def _trials(protocol: Protocol, place: Place) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, arm in protocol.arms.items():
        for rate in protocol.tuning.rates if arm.do == "train" and arm.rate_of is None else ():
            file = place.out / "trials" / f"{trial_key(name, rate)}.json"
            if file.is_file():
                found.setdefault(name, {})[f"{rate:g}"] = read_json(file)["average"]
    return found
