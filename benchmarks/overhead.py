"""What the system costs and gains against a plain loop: the same rounds by examples/one_file.py, `local` and `ray`.

    python benchmarks/overhead.py --rounds 6 --repeats 3

The same model, batch, steps and threads on all sides, one after the other and several times over; printed are images a
second as ratios to the plain loop with their spread, since absolute times are a machine's mood. A side's rate is that
of its median round, so that start-up does not count.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from opd_ray.commands.train import run_training
from opd_ray.config import ATTENTION
from opd_ray.console import console
from opd_ray.metrics import rows
from opd_ray.recipes import load

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 24


def plain(rounds: int, folder: Path, threads: int) -> float:
    """Images a second of the one-file loop, by its own count."""
    command = [sys.executable, ROOT / "examples/one_file.py", "--rounds", str(rounds), "--images", str(IMAGES)]
    command += ["--out", folder / "student"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return statistics.median(float(rate) for rate in re.findall(r"([\d.]+) images/s", output))


def ours(runtime: str, rounds: int, folder: Path, threads: int) -> float:
    """Images a second of a run of the demo's recipe, trained on all nine steps as the one-file loop does."""
    overrides = [
        f"name={runtime}",
        f"rounds={rounds}",
        f"cluster.runtime={runtime}",
        "algorithm.steps_per_item=null",
        "evaluation.images_per_task=0",
        f"student.lora.targets=[{','.join(ATTENTION)}]",  # what the one-file loop trains
        f"batch.images_per_task={IMAGES}",
        f"batch.item_size={IMAGES}",
        *(f"cluster.{role}.threads={threads}" for role in ("rollout", "teachers.default", "learner")),
    ]
    if runtime == "ray":  # one thread for each of the roles that work at the same time
        overrides += ["cluster.rollout.threads=1", "cluster.teachers.default.threads=1"]
    run_training(load("demo", overrides), folder / runtime, resume=False)
    seconds = [row["seconds"]["round"] for row in rows(folder / runtime / "metrics.jsonl")]
    return 3 * IMAGES / statistics.median(seconds)


def main() -> None:
    """Run all sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the plain loop, local and the learner")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {"local": [], "ray": []}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            base = plain(args.rounds, Path(folder), args.threads)
            for runtime, found in ratios.items():
                found.append(ours(runtime, args.rounds, Path(folder), args.threads) / base)
        console.print(f"repeat {repeat + 1}: " + ", ".join(f"{name} {found[-1]:.2f}" for name, found in ratios.items()))
    for name, found in ratios.items():
        console.print(
            f"{name}: {statistics.median(found):.2f} x the plain loop's images a second "
            f"({min(found):.2f} to {max(found):.2f} in {len(found)} repeats)"
        )


if __name__ == "__main__":
    main()
