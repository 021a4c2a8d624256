"""The planner against real Ray: rates measured on one split, throughput predicted for others, and what they do.

    python benchmarks/planner.py --repeats 3

Workers sleep for as long as their item takes; the loop, the dispatcher, the pools, the learner group, Ray and a publish
of 20 MB a round are real. The rates come from one run with one worker of each role, as `opd-ray plan --from-run` takes
them from a run's rows, and know nothing of the seconds that were slept. Printed is the error of each prediction,
(predicted - measured) / measured, of the median over repeats; it should be at most 10 % everywhere.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from line import Line, Times, Workers, backend, middle

from opd_ray.experience import Round
from opd_ray.planning.rates import Rates
from opd_ray.planning.schedule import throughput
from opd_ray.planning.split import bottleneck
from opd_ray.runtime.handle import Weights

MIX = {"a": 12}
"""Items of a round."""
REFERENCE = Workers(1, 1, 1)
SPLITS = (
    Workers(2, 1, 1),
    Workers(3, 1, 1),
    Workers(2, 2, 1),
    Workers(4, 2, 1),
    Workers(4, 2, 2),
    Workers(6, 3, 2),
    Workers(6, 2, 3),
)
WORST = 0.10


class Recorded(Line):
    """A line that notes what a round cost its learner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.busy: list[float] = []
        self.idle: list[float] = []

    def finish_round(self, batch: Round, updates: Sequence[Any], weights: Weights) -> None:
        """Note when it ended, and who did what."""
        super().finish_round(batch, updates, weights)
        self.busy.append(self.dispatcher.seconds.pop("learner", 0.0))
        self.idle.append(self.learner.idle)


def measure(line: Recorded, rounds: int) -> Rates:
    """What ``Rates.from_run`` computes from the rows of a run with these rounds."""
    before = {pool.spec.role: pool.usage for pool in (line.rollout, line.teacher)}
    seconds = line.run(rounds, staleness=0)
    spent = {pool.spec.role: pool.usage - before[pool.spec.role] for pool in (line.rollout, line.teacher)}
    shared = statistics.median(line.busy)
    at_work = statistics.median(seconds) - statistics.median(line.idle)
    return Rates(
        item_size=1,
        items=line.mix,
        seconds={role: used.busy / used.answers for role, used in spent.items()},
        transfer={role: used.transfer / used.answers for role, used in spent.items()},
        learner={"serial": max(at_work - shared / len(line.learner.ranks), 0.0), "shared": shared},
    )


def row(ray: Any, rates: Rates, workers: Workers, times: Times, args: argparse.Namespace) -> list[float]:
    """Measure a split at each staleness; the errors of the predictions."""
    line, errors = Recorded(ray, workers, times, MIX), []
    pools = {"rollout": workers.rollout, "teacher": workers.teacher, "learner": workers.learner}
    for staleness in args.staleness:
        runs = [line.run(args.rounds, staleness=staleness) for _ in range(args.repeats)]
        found = [sum(MIX.values()) / statistics.mean(seconds) for seconds in runs]
        predicted = throughput(rates, pools, staleness)
        error = predicted / statistics.median(found) - 1
        bound = bottleneck(rates, pools, staleness)
        print(f"| {workers} | {staleness} | {predicted:.2f} | {middle(found)} | {error:+.1%} | {bound} |", flush=True)
        errors.append(error)
    line.close()
    return errors


def main() -> None:
    """Measure the rates, then every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--draw", type=float, default=0.80, help="seconds slept for an item")
    parser.add_argument("--mark", type=float, default=0.40)
    parser.add_argument("--take", type=float, default=0.24)
    parser.add_argument("--update", type=float, default=0.24, help="seconds slept once a round")
    args = parser.parse_args()
    times = Times(args.draw, args.mark, args.take, args.update)
    with backend() as ray:
        line = Recorded(ray, REFERENCE, times, MIX)
        rates = measure(line, args.rounds)
        line.close()
        print(f"rates of {REFERENCE}:\n{rates.to_yaml()}")
        print("| rollout + teacher + learner | staleness | predicted items/s | measured | error | bottleneck |")
        print("|---|--:|--:|--:|--:|---|", flush=True)
        errors = [error for workers in SPLITS for error in row(ray, rates, workers, times, args)]
    worst = max(map(abs, errors))
    print(f"worst error {worst:.1%} of {len(errors)}; at most {WORST:.0%} is wanted")
    sys.exit(worst > WORST)


if __name__ == "__main__":
    main()
