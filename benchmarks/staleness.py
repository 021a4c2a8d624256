"""What drawing ahead costs and gains: the demo at max_staleness 0, 1, 2 and 4, with the same number of samples each.

    python benchmarks/staleness.py --seeds 0 1 2 --images 256            # what it costs: gap closed
    python benchmarks/staleness.py --speed --repeats 3                   # what it gains: seconds a round on Ray

The first part trains in one process, which gives the same student as Ray: which weights draw which round does not
depend on time. A run that is in ``--out`` already is not run again, so that seeds may be divided over processes. The
second part runs on Ray, all settings in turn and several times over, and prints seconds a round as ratios to
staleness 0.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_ray.commands.train import run_training
from opd_ray.console import console
from opd_ray.metrics import rows
from opd_ray.recipes import load
from opd_ray.storage.run_folder import read_json


def trained(staleness: int, seed: int, images: int, rounds: int, out: Path) -> dict[str, Any]:
    """The result of one run of the demo."""
    name = f"staleness-{staleness}-seed-{seed}"
    found = out / name / "result.json"
    if found.exists() and (result := read_json(found))["status"] == "done":
        return result
    chosen = [f"name={name}", f"seed={seed}", f"evaluation.images_per_task={images}", "cluster.runtime=local"]
    chosen += [f"cluster.max_staleness={staleness}", f"rounds={rounds}"]
    return run_training(load("demo", chosen), out / name, resume=(out / name / "run.json").exists())


def spread(values: Sequence[float], percent: bool = True) -> str:
    """Mean (lowest to highest)."""
    unit, scale = (" %", 100.0) if percent else ("", 1.0)
    digits = 1 if percent else 2
    low, mean, high = (f"{scale * f(values):.{digits}f}" for f in (min, statistics.mean, max))
    return f"{mean}{unit} ({low} to {high})"


def cost(args: argparse.Namespace, out: Path) -> None:
    """Print the gap closed by task over the seeds."""
    results = {
        k: [trained(k, seed, args.images, args.rounds or 80, out) for seed in args.seeds] for k in args.staleness
    }
    tasks = list(results[args.staleness[0]][0]["gap_closed"])
    console.print("| staleness | " + " | ".join(tasks) + " | mean of tasks |", markup=False)
    console.print("|---" * (len(tasks) + 2) + "|", markup=False)
    for k, found in results.items():
        closed = [[result["gap_closed"][task]["value"] for result in found] for task in tasks]
        means = [statistics.mean(of_seed) for of_seed in zip(*closed, strict=True)]
        cells = " | ".join(spread(values) for values in [*closed, means])
        console.print(f"| {k} | {cells} |", markup=False, soft_wrap=True)


def gain(args: argparse.Namespace, out: Path) -> None:
    """Print seconds a round as ratios to staleness 0."""
    seconds: dict[int, list[float]] = {k: [] for k in args.staleness}
    rounds = args.rounds or 12
    for repeat, k in itertools.product(range(args.repeats), args.staleness):
        name = f"speed-{k}-{repeat}"
        chosen = [f"name={name}", f"rounds={rounds + k + 1}", "evaluation.images_per_task=0"]
        chosen += [f"cluster.max_staleness={k}", "checkpoint.every=1000"]
        run_training(load("demo", chosen), out / name, resume=False)
        # Neither the start, nor the rounds at the end that draw nothing ahead.
        ends = [row["time"] for row in rows(out / name / "metrics.jsonl")][: rounds + 1]
        seconds[k].append((ends[-1] - ends[0]) / (len(ends) - 1))
    console.print("| staleness | seconds a round, of staleness 0's |\n|---|---|", markup=False)
    for k, found in seconds.items():
        ratios = [mine / base for mine, base in zip(found, seconds[args.staleness[0]], strict=True)]
        console.print(f"| {k} | {spread(ratios, percent=False)} |", markup=False, soft_wrap=True)


def main() -> None:
    """Run either part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--speed", action="store_true", help="what it gains, in place of what it costs")
    parser.add_argument("--rounds", type=int, help="of each run: 80 as in the demo, or 12 where it is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        (gain if args.speed else cost)(args, args.out or Path(scratch))


if __name__ == "__main__":
    main()
