"""What a second learner rank gains: one optimizer step over the same drawings by one rank and by two, on as many cores.

    python benchmarks/ranks.py --repeats 3

A round of the demo is drawn and marked once; then the learner group alone is timed, from the first item that it is
given to the end of its update, over more and more of the round's items, while everybody else rests. Each rank has one
thread. Both numbers of ranks come in turn and several times over; printed are samples a second of one rank, and the
ratio. Where there are too few samples, a rank waits for the other and for the reduction of the gradients.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from opd_ray.build import build
from opd_ray.console import console
from opd_ray.recipes import load
from opd_ray.report.live import Live
from opd_ray.run import Run
from opd_ray.runtime.group import Collected

ITEM = 12
"""Pictures of a work item."""


class Kept(Collected):
    """Its arrays stay, to be learned from once more."""

    def let_go(self) -> None:
        """Nothing goes."""


def kept(one: Collected) -> Kept:
    """The same item."""
    return Kept(**{field.name: getattr(one, field.name) for field in fields(one)})


def step(run: Run, collected: Sequence[Collected]) -> float:
    """Seconds of an update over these items."""
    start = time.perf_counter()
    run.learner.begin([one.item for one in collected])
    for one in collected:
        run.learner.take(one)
    run.learner.update(0)
    return time.perf_counter() - start


def measure(ranks: int, counts: Sequence[int], steps: int) -> dict[int, float]:
    """Items -> samples a second, median over the steps."""
    each = -(-max(counts) // 3) * ITEM
    chosen = [f"batch.images_per_task={each}", f"batch.item_size={ITEM}", f"cluster.learner.ranks={ranks}"]
    chosen += ["evaluation.images_per_task=0", "rounds=1", "cluster.rollout.workers=1"]
    config = load("demo", chosen)
    live = Live(1, "ranks", console=Console(file=io.StringIO()))
    with tempfile.TemporaryDirectory() as folder, build(config, Path(folder) / "run", live) as run:
        batch = run.source.collect(0, run.learner.publish())
        run.dispatcher.wait(batch.jobs)
        collected = [kept(one) for one in batch.collected]
        step(run, collected[: max(counts)])
        return {
            count: count * ITEM / statistics.median(step(run, collected[:count]) for _ in range(steps))
            for count in counts
        }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[2, 4, 6, 12, 24])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[int, list[dict[int, float]]] = {1: [], args.ranks: []}
    for _ in range(args.repeats):
        for ranks, rates in found.items():
            rates.append(measure(ranks, args.items, args.steps))
    console.print(
        f"| samples a step | 1 rank, samples/s | {args.ranks} ranks, times that |\n|---|---|---|", markup=False
    )
    for count in args.items:
        one = [rates[count] for rates in found[1]]
        gains = [more[count] / less for more, less in zip(found[args.ranks], one, strict=True)]
        spread = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        console.print(f"| {count * ITEM} | {statistics.median(one):.1f} | {spread} |", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
