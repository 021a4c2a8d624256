"""What a protocol comes to: pieces of work, each with what has to be there before."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opd_ray.comparison.arms import PROMPTS, REFERENCE, Arm
from opd_ray.comparison.protocol import Protocol
from opd_ray.recipes import assignments
from opd_ray.storage.run_folder import read_json

__all__ = [
    "Node",
    "Place",
    "key_of",
    "needs_of",
    "overrides_of",
    "plan",
    "points_of",
    "rate_of",
    "rounds_of",
    "trial_key",
    "weight_of",
]

Kind = Literal["train", "record", "merge", "judge", "trial", "cosines"]


@dataclass(frozen=True, slots=True)
class Node:
    """One piece of work."""

    key: str
    """Its name, and that of its folder or file."""
    kind: Kind
    """judge scores a model at the reported prompts, trial at those of tuning."""
    arm: str
    seed: int
    needs: tuple[str, ...]
    """Keys of the nodes before it."""
    rate: float | None = None
    """The learning rate of a trial; chosen by the trials otherwise."""

    @property
    def model(self) -> str:
        """Of judge and trial: the key of what is judged."""
        return self.key.partition("/")[2]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a comparison's files are."""

    out: Path

    def work(self, key: str) -> Path:
        """A run's folder, a merge's, or that of recordings."""
        return self.out / "work" / key

    @property
    def prompts(self) -> Path:
        """The folder of copied prompts."""
        return self.out / "prompts"

    def cost(self, key: str) -> Path:
        """What it took."""
        return self.out / "costs" / f"{key}.json"

    def found(self, node: Node) -> Path:
        """The file whose being there says that the work is done."""
        if node.kind in {"judge", "trial", "cosines"}:
            return self.out / f"{node.key}.json"
        return self.cost(node.key)

    def done(self, node: Node) -> bool:
        """Whether there is nothing left to do."""
        if not self.found(node).is_file():
            return False
        return node.kind not in {"train", "record", "merge"} or bool(read_json(self.found(node)).get("done"))


def key_of(protocol: Protocol, name: str, seed: int) -> str:
    """An arm with a seed; the base has none."""
    return name if protocol.arms[name].do == "base" else f"{name}-s{seed}"


def trial_key(name: str, rate: float) -> str:
    """An arm's trial of a learning rate."""
    return f"{name}-lr{rate:g}"


def plan(protocol: Protocol) -> list[Node]:
    """All work, seed by seed in the order of the arms; what a node needs stands before it."""
    nodes: dict[str, Node] = {}
    for seed in protocol.seeds:
        for name, arm in protocol.arms.items():
            if arm.do == "router":
                continue  # made of what is judged of others
            made = _make(protocol, name, seed, nodes)
            if arm.do in {"record", "cosines"}:
                continue
            key = f"judged/{key_of(protocol, name, seed)}"
            nodes.setdefault(key, Node(key, "judge", name, seed, made))
    return list(nodes.values())


def _make(protocol: Protocol, name: str, seed: int, nodes: dict[str, Node]) -> tuple[str, ...]:
    """Add what makes an arm, with all that it needs; returns the keys to wait for."""
    arm = protocol.arms[name]
    if arm.do == "base" or arm.do == "router":  # types are narrowed by it
        return ()
    key = f"cosines/{name}-s{seed}" if arm.do == "cosines" else key_of(protocol, name, seed)
    if key in nodes:
        return (key,)
    needs = _needed(protocol, name, seed, nodes)
    if arm.do == "train":
        needs += _trials(protocol, arm.rate_of or name, nodes)
    nodes[key] = Node(key, arm.do, name, seed, tuple(dict.fromkeys(needs)))
    return (key,)


def _needed(protocol: Protocol, name: str, seed: int, nodes: dict[str, Node]) -> list[str]:
    """Add what an arm needs; returns the keys to wait for."""
    return [key for need in needs_of(protocol, name, seed) for key in _make(protocol, *need, nodes)]


def needs_of(protocol: Protocol, name: str, seed: int) -> list[tuple[str, int]]:
    """Arms and seeds that have to be there before an arm."""
    return [(need, after(protocol, seed) if following else seed) for need, following in protocol.arms[name].needs]


def after(protocol: Protocol, seed: int) -> int:
    """The next of the protocol's seeds, and the first after the last; of all others, itself."""
    seeds = (*protocol.seeds, *protocol.spare)
    return seeds[(seeds.index(seed) + 1) % len(seeds)] if seed in protocol.seeds else seed


def _trials(protocol: Protocol, name: str, nodes: dict[str, Node]) -> list[str]:
    tuning, judged = protocol.tuning, list[str]()
    if len(tuning.rates) == 1:
        return []
    for rate in tuning.rates:
        key = trial_key(name, rate)
        if f"trials/{key}" not in nodes:
            needs = _needed(protocol, name, tuning.seed, nodes)
            nodes[key] = Node(key, "train", name, tuning.seed, tuple(dict.fromkeys(needs)), rate)
            nodes[f"trials/{key}"] = Node(f"trials/{key}", "trial", name, tuning.seed, (key,), rate)
        judged.append(f"trials/{key}")
    return judged


def rate_of(protocol: Protocol, name: str, place: Place) -> float:
    """The learning rate whose trial scored best at the prompts of tuning; the first of equals."""
    owner = protocol.arms[name].rate_of or name
    rates = protocol.tuning.rates
    if len(rates) == 1:
        return rates[0]
    worth = {rate: read_json(place.out / "trials" / f"{trial_key(owner, rate)}.json")["average"] for rate in rates}
    return max(worth, key=worth.__getitem__)


def rounds_of(protocol: Protocol, node: Node) -> int:
    """Of a run; a trial has a share of its arm's."""
    rounds = protocol.arms[node.arm].rounds
    return rounds if node.rate is None else max(1, math.ceil(rounds * protocol.tuning.rounds))


def points_of(arm: Arm) -> list[int]:
    """Rounds after which a curve has a point: of the checkpoints, those nearest to equal parts, and the last."""
    every, parts = _checkpoints_of(arm), range(1, arm.curve)
    nearest = {every * max(1, round(arm.rounds * part / arm.curve / every)) for part in parts}
    return sorted({*(point for point in nearest if point < arm.rounds), arm.rounds})


def _checkpoints_of(arm: Arm) -> int:
    """Rounds from one checkpoint to the next, of an arm with a curve."""
    return max(1, arm.rounds // arm.curve)


def overrides_of(protocol: Protocol, node: Node, place: Place) -> list[str]:
    """What is set in the recipe of a run or recording, as options of the command line."""
    arm = protocol.arms[node.arm]
    chosen = protocol.set | arm.set
    if arm.do == "train":
        rate = node.rate if node.rate is not None else rate_of(protocol, node.arm, place)
        chosen |= {"optimizer.lr": rate}
        if arm.curve and node.rate is None:
            chosen |= {"checkpoint.every": _checkpoints_of(arm), "checkpoint.keep": 1000}
    chosen |= {"name": node.key, "seed": node.seed, "rounds": rounds_of(protocol, node)}
    chosen |= {"evaluation.images_per_task": 0, "cluster.runtime": "local"}
    return assignments(_filled(chosen, protocol, node.seed, place))


def _filled(value: Any, protocol: Protocol, seed: int, place: Place) -> Any:
    """With folders in place of the arms' names."""
    if isinstance(value, dict):
        return {key: _filled(one, protocol, seed, place) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(one, protocol, seed, place) for one in value]
    if not isinstance(value, str):
        return value

    def folder(found: Any) -> str:
        other = after(protocol, seed) if found[2] else seed
        return str(place.work(key_of(protocol, found[1], other)).resolve())

    return REFERENCE.sub(folder, value.replace(PROMPTS, str(place.prompts)))


def weight_of(protocol: Protocol, node: Node) -> float:
    """Its length, roughly, in rounds: what progress is counted in."""
    arm = protocol.arms[node.arm]
    match node.kind:
        case "train" | "record":
            return float(rounds_of(protocol, node))
        case "judge":
            return 6.0 + 2.0 * arm.curve
        case "cosines":
            return 12.0
        case "trial" | "merge":
            return 2.0
