"""How much of each teacher's gap the demo's student closes: several seeds, 1024 held-out prompts a task.

    python benchmarks/gap_closed.py --seeds 0 1 2 --images 1024

Each seed is the demo from its start, with its own prompts, noise and adapter; base, teachers and student draw the same
held-out prompts from the same first noise. Prints a Markdown table: mean over seeds, with the lowest and the highest.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ray.commands.train import run_training
from opd_ray.console import console
from opd_ray.recipes import load


def run(seed: int, images: int, overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """The result of one seed."""
    name = f"gap-{seed}"
    chosen = [f"name={name}", f"seed={seed}", f"evaluation.images_per_task={images}", *overrides]
    return run_training(load("demo", chosen), out / name, resume=False)


def spread(values: Sequence[float]) -> str:
    """Mean (lowest to highest)."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(results: Mapping[int, Mapping[str, Any]]) -> str:
    """Scores of every model and the gap closed, over the seeds."""
    first = next(iter(results.values()))
    tasks = list(first["scores"]["base"])
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for model in first["scores"]:
        cells = [spread([result["scores"][model][task]["value"] for result in results.values()]) for task in tasks]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    closed = [
        spread([result["gap_closed"][task]["value"] for result in results.values()])
        if task in first["gap_closed"]
        else ""
        for task in tasks
    ]
    return "\n".join([*lines, "| gap closed | " + " | ".join(closed) + " |"])


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("-o", "--override", action="append", default=[], help="key=value of the demo's recipe")
    parser.add_argument("--out", type=Path, help="keep the run folders and results.json here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        results = {seed: run(seed, args.images, args.override, out) for seed in args.seeds}
        if args.out:
            (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
