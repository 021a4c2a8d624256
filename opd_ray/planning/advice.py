"""One sentence for the end of a run: who held it up, and what would help."""

from collections.abc import Mapping
from pathlib import Path

from opd_ray.errors import UserError
from opd_ray.metrics import rows
from opd_ray.planning.rates import SHARED, Rates, teacher_role
from opd_ray.planning.schedule import throughput
from opd_ray.planning.split import bottleneck

__all__ = ["advice", "advice_for_run"]

MOST_MORE = 64
"""Workers more than a run has: further the model is not asked."""
WORTHWHILE = 1.05
ENOUGH = 0.9
"""Of the gain that any number of workers would give: what the advised number reaches."""


def advice(rates: Rates, workers: Mapping[str, int], waited: float, staleness: int) -> str:
    """Who held up the run, as one plain sentence without a full stop.

    Args:
        rates: as the run measured them: ``Rates.from_run``.
        workers: role -> workers that it had, as the pools are called; ``learner``: ranks.
        waited: the part of the time, 0 to 1, in which the learner waited for items.
        staleness: the run's ``max_staleness``.
    """
    name = bottleneck(rates, workers, staleness)
    share = f"the learner waited {100 * waited:.0f} % of the time"
    if name == "publish":
        seconds = rates.publish + rates.checkpoint
        cost = f"publishing and checkpoints take {seconds:.2g} s of every round"
        return f"publish-bound: {share}; {cost}; raise checkpoint.every or enlarge the round"
    more, gain = _more(rates, workers, name, staleness)
    kind = name.partition(".")[0]
    if gain < WORTHWHILE:
        return f"{kind}-bound: {share}; {_nothing(rates, workers, name, staleness)}"
    return f"{kind}-bound: {share}; {more} more {_noun(name, more)} would give about {gain:.1f}x"


def advice_for_run(folder: Path, workers: Mapping[str, int], staleness: int) -> str:
    """The same for a run that ended, from what it measured; empty where it measured too little."""
    found = [row["seconds"] for row in rows(folder / "metrics.jsonl") if row.get("roles")]
    whole = sum(seconds["round"] for seconds in found)
    if not whole:
        return ""
    try:
        rates = Rates.from_run(folder)
    except UserError:
        return ""
    return advice(rates, workers, min(sum(seconds["wait"] for seconds in found) / whole, 1.0), staleness)


def _more(rates: Rates, workers: Mapping[str, int], name: str, staleness: int) -> tuple[int, float]:
    """The smallest number of further workers that nearly reaches what any number gives, and what it gives."""
    now, count = throughput(rates, workers, staleness), workers[name]
    most = min(rates.item_count - count, MOST_MORE) if name == "learner" else MOST_MORE

    def gain(more: int) -> float:
        return throughput(rates, {**workers, name: count + more}, staleness) / now

    if most < 1:
        return 0, 1.0
    wanted = 1 + ENOUGH * (gain(most) - 1)
    more = next(more for more in range(1, most + 1) if gain(more) >= wanted - 1e-9)
    return more, gain(more)


def _noun(name: str, count: int) -> str:
    if name == "learner":
        return "learner rank" + "s" * (count > 1)
    return f"`{name.removeprefix(teacher_role(''))}` worker" + "s" * (count > 1)


def _nothing(rates: Rates, workers: Mapping[str, int], name: str, staleness: int) -> str:
    """Why more workers of the slowest role alone do not help."""
    if name == "learner" and rates.learner.serial > rates.learner.shared / workers["learner"]:
        return "more learner ranks would not help, since most of an update is the same on every rank; enlarge the round"
    if name == "learner" and workers["learner"] >= rates.item_count:
        return "every item of a round has a rank of its own; lower batch.item_size or enlarge the round"
    if staleness == 0:
        ahead = throughput(rates, workers, 1) / throughput(rates, workers, 0)
        if ahead >= WORTHWHILE:
            return f"the roles take turns; cluster.max_staleness=1 would give about {ahead:.1f}x"
    noun = "learner ranks" if name == "learner" else f"{SHARED if name.startswith(SHARED) else name} workers"
    return f"more {noun} alone would give less than {WORTHWHILE:g}x: the roles are in balance"
