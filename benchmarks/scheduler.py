"""The scheduler alone: decisions a second with 10 to 10 000 workers, which cost nothing themselves.

    python benchmarks/scheduler.py --repeats 3

The real pools and dispatcher run over a simulated clock. A decision is a job that is given to a worker; its answer is
taken, and what waits for it wakes up, in the same time. Each drawing has a mark that waits for it. Durations are drawn,
so that hardly two answers come at once. Workers start before the clock runs. The growth exponent is the slope of
log(seconds a decision) over log(workers), by least squares: 0 is constant, 1 is linear.
"""

import argparse
import gc
import math
import statistics
import time

from opd_ray.console import console
from opd_ray.planning.simulated import SimulatedBackend
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.runtime.jobs import Job, Output
from opd_ray.runtime.pool import Pool

SIZES = (10, 100, 1_000, 10_000)
LEAST_DECISIONS = 20_000
FOREVER = 1e9


def seconds(role: str, method: str, args: tuple[object, ...]) -> float:
    """A drawing takes twice as long as a mark, and has twice the workers."""
    return {"draw": 2.0, "score": 1.0}.get(method, 0.0)


def decisions(workers: int, seed: int) -> float:
    """Decisions a second."""
    backend = SimulatedBackend(seconds, spread=0.5, seed=seed)
    dispatcher = Dispatcher(backend, call_timeout_s=FOREVER, clock=backend.clock)

    def pool(role: str, count: int) -> Pool:
        spec = WorkerSpec(role, object, 1, {})
        made = Pool(backend, spec, count, clock=backend.clock, start_timeout_s=FOREVER, call_timeout_s=FOREVER)
        dispatcher.pools.append(made)
        return made

    marking = max(workers // 3, 1)
    draws, marks = pool("rollout", workers - marking), pool("teacher", marking)
    dispatcher.wait_ready()
    items = max(LEAST_DECISIONS, 4 * workers) // 2
    gc.collect()
    start = time.perf_counter()
    jobs = []
    for _ in range(items):
        draw = dispatcher.submit(Job(draws, "draw", (), 1, "drawing"))
        jobs.append(dispatcher.submit(Job(marks, "score", (Output(draw, 0),), 1, "marking", after=(draw,))))
    dispatcher.wait(jobs)
    return 2 * items / (time.perf_counter() - start)


def exponent(sizes: list[int], rates: list[float]) -> float:
    """Slope of log(seconds a decision) over log(workers)."""
    x, y = [math.log(size) for size in sizes], [-math.log(rate) for rate in rates]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure all sizes in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    args = parser.parse_args()
    found: dict[int, list[float]] = {size: [] for size in args.sizes}
    for repeat in range(args.repeats):
        for size, rates in found.items():
            rates.append(decisions(size, repeat))
    console.print(
        "| workers | decisions/s, median | lowest | highest | us a decision |\n|--:|--:|--:|--:|--:|", markup=False
    )
    for size, rates in found.items():
        middle = statistics.median(rates)
        cells = (f"{value:,.0f}" for value in (size, middle, min(rates), max(rates), 1e6 / middle))
        console.print("| " + " | ".join(cells) + " |", markup=False)
    if len(found) > 1:
        slope = exponent(list(found), [statistics.median(rates) for rates in found.values()])
        console.print(f"growth exponent of the cost of a decision: {slope:.2f} (0 constant, 1 linear)")


if __name__ == "__main__":
    main()
