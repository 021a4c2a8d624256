"""Do the roles overlap? Fixed-time workers on real Ray, against what the busiest role could do if it never waited.

    python benchmarks/overlap.py published           # the split of one published step
    python benchmarks/overlap.py splits --repeats 3  # 5 to 32 workers

Every worker sleeps for as long as its item takes; the loop, the dispatcher, the pools, the learner group, Ray, and a
publish of 20 MB a round are real. Times are in the proportion that verl-omni published for Stable Diffusion 3.5 medium,
64 images a step, guidance 4.5, one GPU a role: update 17.4 s, teacher 9.4, old log-probabilities 5.6, weights 3.4, a
step 36.2 s (about 26.8 with the teacher hidden). How long its drawing takes is not published, since it is hidden: here
16 s on one worker, and 32 s on two.

The bound of a split is the largest, over roles, of the seconds that the role needs for a round when it never waits.
With staleness 0 a round draws only after the last publish, so the line fills and runs dry once a round: ``alone`` is
the time of such a round without any cost of the system, and fill = alone / (bound / m) - m is how many more items the
busiest role could have done in it.
"""

import argparse
import statistics
from typing import Any

from line import Line, Times, Workers, backend, middle

ITEMS = 8
"""Work items of a published step: 64 images by eight."""
UPDATE, TEACHER, STEP, HIDDEN = 17.4, 9.4, 36.2, 26.8
LAST = 0.02
"""Share of the update that is the optimizer's own."""

SPLITS = (
    (Workers(2, 2, 1), Workers(2, 2, 2), 16),
    (Workers(2, 3, 5), Workers(4, 3, 5), 20),
    (Workers(4, 1, 4), Workers(4, 2, 4), 16),
    (Workers(10, 6, 4), Workers(10, 6, 8), 40),
    (Workers(14, 8, 5), Workers(14, 8, 10), 40),
)
"""Before and after the busiest role's workers are doubled, and items a round."""


def published(drawing: float) -> Times:
    """Seconds of an item and a round, of a step whose drawing takes so long on one worker."""
    take, update = UPDATE * (1 - LAST) / ITEMS, UPDATE * LAST
    return Times(drawing / ITEMS, TEACHER / ITEMS, take, update)


def seconds(ray: Any, workers: Workers, times: Times, items: int, args: argparse.Namespace) -> dict[int, list[float]]:
    """Staleness -> mean seconds of a round, a number each repeat."""
    line = Line(ray, workers, times, {"a": items})
    found: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(args.repeats):
        for staleness, each in found.items():
            each.append(statistics.mean(line.run(args.rounds, staleness=staleness)))
    line.close()
    return found


def compare(ray: Any, args: argparse.Namespace) -> None:
    """A published step, with theirs and with ours."""
    print("| seconds slept for one published | workers | drawing | staleness | step / update | their step would be |")
    print("|---|---|---|---|---|---|")
    for scale in args.scales:
        for workers, drawing in ((Workers(1, 1, 1), 16.0), (Workers(2, 1, 1), 32.0)):
            found = seconds(ray, workers, published(drawing).scaled(scale), ITEMS, args)
            for staleness, each in found.items():
                ratios = middle([one / (UPDATE * scale) for one in each], ".3f")
                theirs = f"{STEP / UPDATE:.2f}, or {HIDDEN / UPDATE:.2f} with its teacher hidden"
                print(f"| {scale} | {workers} | {drawing:.0f} s | {staleness} | {ratios} | {theirs} |", flush=True)


def scale(ray: Any, args: argparse.Namespace) -> None:
    """Splits, each before and after its busiest role was doubled."""
    print("| rollout + teacher + learner | items | busiest | bound, items/s | measured | of the bound | staleness 0 |")
    print("|---|---|---|---|---|---|---|")
    for number, (before, after, items) in enumerate(SPLITS):
        if args.only is not None and number not in args.only:
            continue
        # Slower with more workers: about the same number of calls a second for the two cores that drive all of them.
        times = published(16.8).scaled(args.pace * before.all / 5)
        times = Times(times.draw, times.mark, times.take, 0.0)
        rates = [row(ray, workers, times, items, args) for workers in (before, after)]
        gain = [after / before for before, after in zip(*rates, strict=True)]
        wanted = max(before.bounds(times, items).values()) / max(after.bounds(times, items).values())
        print(f"twice the busiest role's workers: {middle(gain)} times the items (bound {wanted:.2f})", flush=True)


def row(ray: Any, workers: Workers, times: Times, items: int, args: argparse.Namespace) -> list[float]:
    """Measure a split; items a second at staleness 1."""
    bounds = workers.bounds(times, items)
    busiest = max(bounds, key=bounds.__getitem__)
    bound, alone = bounds[busiest], workers.alone(times, items)
    found = seconds(ray, workers, times, items, args)
    fill = items * alone / bound - items
    strict = middle([alone / one for one in found[0]], ".3f")
    print(
        f"| {workers} = {workers.all} | {items} | {busiest} | {items / bound:.2f} | "
        f"{middle([items / one for one in found[1]])} | {middle([bound / one for one in found[1]], '.3f')} | "
        f"{strict} of m/(m + {fill:.1f}) |",
        flush=True,
    )
    return [items / one for one in found[1]]


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["published", "splits"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.05, 0.2], help="seconds for one published")
    parser.add_argument("--pace", type=float, default=0.15, help="the same for five workers; more workers, slower")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of splits")
    args = parser.parse_args()
    with backend() as ray:
        {"published": compare, "splits": scale}[args.what](ray, args)


if __name__ == "__main__":
    main()
