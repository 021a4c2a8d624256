"""A round's drawings and scores: scored while the next ones are drawn, against scored after all are drawn.

    python benchmarks/reward_overlap.py --rounds 8

One drawing worker and one reward worker on Ray, one thread each, at the tiny world. The reward is a PickScore of
random weights and moderate width, so that drawing and scoring take about as long. Both ways take turns within one run,
with the same weights; nothing is trained.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewards import FILES, MODERATE, middle
from rich.console import Console

from opd_ray.build import build
from opd_ray.recipes import load
from opd_ray.report.live import Live
from opd_ray.run import Run
from opd_ray.runtime.handle import Weights
from opd_ray.runtime.jobs import Job, Output
from opd_ray.scoring import Judges
from opd_ray.types import Prompt

CHANGES = (
    "rewards={{pickscore: {{model: {0}, processor: {0}, probe: finite}}}}",
    *("algorithm.reward_weights={{}}", "evaluation.images_per_task=0", "prompts.eval=null", "evaluation.rewards={{}}"),
    *(
        "cluster.runtime=ray",
        "cluster.rollout={{workers: 1, resources: {{cpu: 0.5}}}}",
        "cluster.learner.resources={{cpu: 0.25}}",
    ),
    "cluster.rewards.default={{workers: 1, resources: {{cpu: 0.5}}, batch: 8}}",
)


class Later:
    """Stands for the judges while a round is drawn, and gives them all of it then."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        self.asked: list[tuple[Any, ...]] = []

    def score(self, prompts: Sequence[Prompt], manifest: Callable[[], Any], images: Output, label: str) -> tuple[()]:
        self.asked.append((prompts, manifest, images, label))
        return ()

    def now(self) -> list[Job]:
        jobs = [job for one in self.asked for job in self.judges.score(*one)]
        self.asked.clear()
        return jobs


def overlapped(run: Run, number: int, weights: Weights) -> float:
    start = time.perf_counter()
    run.dispatcher.wait(run.source.collect(number, weights).jobs)
    return time.perf_counter() - start


def after(run: Run, number: int, weights: Weights) -> tuple[float, float]:
    """Seconds in all, and of drawing alone."""
    source: Any = run.source
    judges, source.judges = source.judges, Later(source.judges)
    start = time.perf_counter()
    run.dispatcher.wait(run.source.collect(number, weights).jobs)
    drawn = time.perf_counter() - start
    run.dispatcher.wait(source.judges.now())
    source.judges = judges
    return time.perf_counter() - start, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of each way")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        write, _ = FILES["pickscore"]
        files = Path(folder) / "pickscore"
        files.mkdir()
        write(files, MODERATE)
        config = load("world_flow_grpo", [change.format(files) for change in CHANGES])
        with build(config, Path(folder) / "run", Live(1, "overlap")) as run:
            weights = run.learner.publish()
            overlapped(run, 0, weights)  # everything is loaded and allocated
            ways: dict[str, list[float]] = {"overlapped": [], "after": [], "drawing": []}
            for number in range(args.rounds):
                ways["overlapped"].append(overlapped(run, number, weights))
                whole, drawn = after(run, number, weights)
                ways["after"].append(whole)
                ways["drawing"].append(drawn)
    images = config.batch.images_per_task
    for name, seconds in ways.items():
        console.print(f"{name}: {middle([images / one for one in seconds])} images/s")
    ratios = [later / now for now, later in zip(ways["overlapped"], ways["after"], strict=True)]
    console.print(f"overlapped is {middle(ratios)} times as fast")
    longer = [max(drawn, whole - drawn) for whole, drawn in zip(ways["after"], ways["drawing"], strict=True)]
    bound = [whole / most for whole, most in zip(ways["after"], longer, strict=True)]
    console.print(f"at most {statistics.median(bound):.2f} times, where the longer of the two is all that is left")


if __name__ == "__main__":
    main()
