"""What the system costs and gains against a plain loop: the same rounds by examples/one_file.py, `local` and `ray`.

    python benchmarks/overhead.py --rounds 6 --repeats 3

The same model, batch and steps on all sides, on the same two cores, one after the other and several times over. The
plain loop runs with one torch thread and with two, and the faster of them is what the others are compared with; `local`
and every role of `ray` have one thread. Printed are seconds a round as ratios to the plain loop's with their spread,
since absolute times are a machine's mood. A side's time is that of its median round, so that start-up does not count.
"""

import argparse
import itertools
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
ITEM = 12
SIDES = {
    "local": ["cluster.runtime=local"],
    "ray, staleness 0": ["cluster.max_staleness=0"],
    "ray, staleness 1": ["cluster.max_staleness=1"],
}
PARTS = ("busy", "transfer", "input", "output")


def plain(rounds: int, folder: Path, threads: int) -> float:
    """Seconds of a round of the one-file loop, by its own count."""
    command = [sys.executable, ROOT / "examples/one_file.py", "--rounds", str(rounds), "--images", str(IMAGES)]
    command += ["--out", folder / f"student-{threads}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return 3 * IMAGES / statistics.median(float(rate) for rate in re.findall(r"([\d.]+) images/s", output))


def ours(side: str, rounds: int, folder: Path) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of a round of the demo's recipe, trained on all nine steps as the one-file loop does; roles' shares."""
    overrides = [
        f"name={side.replace(', ', '-').replace(' ', '-')}",
        f"rounds={rounds + 2}",  # the first holds the start, the last draws nothing ahead
        "algorithm.steps_per_item=null",
        "evaluation.images_per_task=0",
        f"student.lora.targets=[{','.join(ATTENTION)}]",  # what the one-file loop trains
        f"batch.images_per_task={IMAGES}",
        f"batch.item_size={ITEM}",
        *SIDES[side],
        *(f"cluster.{role}.threads=1" for role in ("rollout", "teachers.default", "learner")),
    ]
    config = load("demo", overrides)
    run_training(config, folder / config.name, resume=False)
    found = list(rows(folder / config.name / "metrics.jsonl"))[1:-1]
    ends = [row["time"] for row in found]
    each = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(each), _shares([row["roles"] for row in found if "roles" in row])


def _shares(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Role -> share of its workers' time by what they did."""
    shares: dict[str, dict[str, float]] = {}
    for role in found[0] if found else ():
        spent = {part: sum(row[role][part] for row in found) for part in PARTS}
        shares[role] = {part: seconds / (sum(spent.values()) or 1.0) for part, seconds in spent.items()}
    return shares


def main() -> None:
    """Run all sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {side: [] for side in SIDES}
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            base = {threads: plain(args.rounds, Path(folder), threads) for threads in (1, 2)}
            for side, found in ratios.items():
                seconds, shares[side] = ours(side, args.rounds, Path(folder))
                found.append(seconds / min(base.values()))
        console.print(
            f"repeat {repeat + 1}: plain {base[1]:.2f} s a round with one thread, {base[2]:.2f} s with two; "
            + ", ".join(f"{name} {found[-1]:.2f}" for name, found in ratios.items())
        )
    console.print("\n| side | seconds a round, of the plain loop's | spread |\n|---|---|---|", markup=False)
    for name, found in ratios.items():
        spread = f"{min(found):.2f} to {max(found):.2f} in {len(found)} repeats"
        console.print(f"| {name} | {statistics.median(found):.2f} | {spread} |", markup=False, soft_wrap=True)
    console.print("\n| side | role | " + " | ".join(PARTS) + " |\n|---|---" + "|---" * len(PARTS) + "|", markup=False)
    for side, roles in shares.items():
        for role, parts in roles.items():
            cells = " | ".join(f"{100 * parts[part]:.0f} %" for part in PARTS)
            console.print(f"| {side} | {role} | {cells} |", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
