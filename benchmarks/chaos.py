"""What it costs that workers die: a recipe undisturbed, then with random kills in all of its roles.

    python benchmarks/chaos.py --kills 30 --seed 0

Kills come at seeded moments of the run's progress and hit a worker that has work: mostly SIGKILL, also SIGSTOP and a
worker whose Python hangs; a learner rank is killed outright. Printed are, by role and kind, how long it took until the
loss was known, how long from there until the lost work was being done again, and what was done twice; then whether the
student is the same, bit for bit. The target for the second: 5 s beside the time that a new worker takes to start.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.build import build
from opd_ray.config import Config
from opd_ray.console import console, errors
from opd_ray.errors import Stopped
from opd_ray.loop import train
from opd_ray.recipes import load
from opd_ray.report.live import Live
from opd_ray.run import Run
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.roster import Worker

TARGET_S = 5.0
KINDS = {"SIGKILL": 0.7, "SIGSTOP": 0.15, "hang": 0.15}
QUICK = ["evaluation.images_per_task=0", "cluster.heartbeat_timeout_s=5", "cluster.call_timeout_s=20"]
MAX_STOPS = 5


@dataclass
class Kill:
    """One of them, planned and then told."""

    moment: float
    """In rounds."""
    role: str
    kind: str
    name: str = ""
    """Of the worker that was hit."""
    at: float = 0.0
    detected: float | None = None
    redone: float | None = None
    """When all that it had was being done again; when the loss was known, where it had nothing any more."""
    jobs: list[Job] = field(default_factory=list)
    items: int = 0
    rounds: int = 0
    """Begun before it and done again."""
    successor: str = ""
    start: float | None = None
    """Seconds that its successor took to come up."""

    @property
    def detection(self) -> float | None:
        return None if self.detected is None else self.detected - self.at

    @property
    def recovery(self) -> float | None:
        return None if self.redone is None or self.detected is None else self.redone - self.detected

    @property
    def in_time(self) -> bool:
        return self.recovery is not None and self.recovery <= TARGET_S + (self.start or 0.0)


def plan(count: int, rounds: int, roles: Collection[str], seed: int) -> list[Kill]:
    """As many for each role, in a random order, at moments spread over the run."""
    rng = random.Random(seed)
    chosen = [role for _ in range(-(-count // len(roles))) for role in roles][:count]
    rng.shuffle(chosen)
    moments = sorted(rng.uniform(0.3, rounds - 0.7) for _ in range(count))
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    return [
        Kill(moment, role, "SIGKILL" if role == "learner" else kind)
        for moment, role, kind in zip(moments, chosen, kinds, strict=True)
    ]


class Chaos:
    """Strikes a run as planned and watches what becomes of it, whenever its driver waits for something."""

    def __init__(self, kills: list[Kill]) -> None:
        self.kills = kills
        self.left = list(kills)
        self.open: list[Kill] = []

    def watch(self, run: Run) -> None:
        """Begin with a run, or with another attempt of it."""
        self.run, self.batch, self.starts, self.rebuilding = run, list[Job](), dict[str, float](), False
        self.open.clear()
        _around(run.dispatcher.backend, "wait", before=lambda *args: self.look())
        _around(run.dispatcher.backend, "start", before=lambda spec, name: self.started(name))
        _around(run.source, "collect", after=lambda batch: setattr(self, "batch", batch.jobs))
        _around(run.learner, "begin", before=lambda items: self.begins())
        _around(run.learner, "rebuild", before=self.rebuilds, after=lambda none: self.rebuilt())
        for pool in run.dispatcher.pools:
            _around(pool, "condemn", before=lambda worker, why, pool=pool: self.condemned(worker))

    def look(self) -> None:
        """Strike what is due, and see how far earlier ones are."""
        done = sum(job.done for job in self.batch) / len(self.batch) if self.batch else 0.0
        while self.left and self.left[0].moment <= self.run.round + done and self.strike(self.left[0]):
            self.left.pop(0)
        now = time.monotonic()
        up = {worker.handle.name for pool in self.run.dispatcher.pools for worker in pool.workers if worker.up}
        for kill in self.kills:
            if kill.start is None and kill.successor in up:
                kill.start = now - self.starts[kill.successor]
        for kill in list(self.open):
            kill.jobs = [job for job in kill.jobs if not job.dropped and (job.call is None or job.by == kill.name)]
            if kill.detected is not None and kill.role != "learner" and not kill.jobs:
                kill.redone = now
                self.open.remove(kill)

    def strike(self, kill: Kill) -> bool:
        """Hit somebody; false where there is nobody to hit now."""
        kill.name, kill.at = "", time.monotonic()
        if kill.role == "learner":
            if self.rebuilding or any(one.role == "learner" for one in self.open):
                return False
            rank = self.run.learner.ranks[0]
            kill.name, kill.rounds = rank.name, self.run.round
            beat = rank.beat()
            os.kill(self.run.dispatcher.backend.result(beat.done).value.pid, signal.SIGKILL)
        else:
            hit = {one.name for one in self.open}
            busy = [
                worker
                for pool in self.run.dispatcher.pools
                if _role(pool) == kill.role
                for worker in pool.workers
                if worker.pulse is not None and worker.first is not None and worker.handle.name not in hit
            ]
            if not busy:
                return False
            worker = busy[0]
            kill.name = worker.handle.name
            if kill.kind == "hang":
                worker.handle._actor.__ray_call__.remote(_hang)
            else:
                with suppress(ProcessLookupError):
                    os.kill(worker.pulse.pid, getattr(signal, kill.kind))
        self.open.append(kill)
        errors.print(f"{kill.kind} {kill.name} in round {self.run.round + 1}")
        return True

    def started(self, name: str) -> None:
        self.starts[name] = time.monotonic()
        for kill in self.open:
            if (
                kill.detected is not None
                and not kill.successor
                and name.rpartition("-")[0] == kill.name.rpartition("-")[0]
            ):
                kill.successor = name
                return

    def condemned(self, worker: Worker) -> None:
        for kill in self.open:
            if kill.name == worker.handle.name and kill.detected is None:
                kill.detected = time.monotonic()
                kill.jobs = [job for job in worker.flying.values() if job is not None and not job.dropped]
                kill.items = len(kill.jobs)

    def rebuilds(self) -> None:
        self.rebuilding = True
        for kill in self._of_learner():
            kill.detected, kill.rounds = time.monotonic(), self.run.round

    def rebuilt(self) -> None:
        self.rebuilding = False
        for kill in self._of_learner():
            kill.start = time.monotonic() - (kill.detected or 0.0)

    def begins(self) -> None:
        """The learner begins a round."""
        for kill in self._of_learner():
            if kill.detected is not None:
                kill.redone, kill.rounds = time.monotonic(), kill.rounds - self.run.round + 1
                self.open.remove(kill)

    def _of_learner(self) -> list[Kill]:
        return [kill for kill in self.open if kill.role == "learner"]


def _role(pool: Pool) -> str:
    return pool.spec.role.partition(".")[0]


def _hang(process: Any) -> None:
    time.sleep(10**6)


def _around(
    thing: Any,
    name: str,
    before: Callable[..., Any] = lambda *args: None,
    after: Callable[..., Any] = lambda made: None,
) -> None:
    """Look at a method's arguments before it, and at what it gave after it."""
    own = getattr(thing, name)

    def method(*args: Any, **options: Any) -> Any:
        before(*args)
        made = own(*args, **options)
        after(made)
        return made

    object.__setattr__(thing, name, method)


def run_once(config: Config, folder: Path, chaos: Chaos | None) -> tuple[str, float, int]:
    """The student's hash, seconds of the rounds, and how often it had to be started again."""
    seconds = 0.0
    for stops in range(MAX_STOPS):
        with build(config, folder, Live(config.rounds, config.name, console=errors), resume=stops > 0) as run:
            if chaos is not None:
                chaos.watch(run)
            start = time.monotonic()
            try:
                train(run)
                return run.finish()["student_sha256"], seconds + time.monotonic() - start, stops
            except Stopped as error:
                errors.print(f"stopped: {error}")
                run.stop(str(error))
                seconds += time.monotonic() - start
    raise SystemExit(f"the run stopped {MAX_STOPS} times")


def table(kills: list[Kill]) -> list[str]:
    """A row of Markdown for each role and kind."""

    def spread(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.median(known):.1f} ({max(known):.1f})" if known else "-"

    lines = [
        "| role | kind | kills | known after, s | redone after that, s | new worker up in, s | items again "
        "| rounds again | in time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for role, kind in sorted({(kill.role, kill.kind) for kill in kills}):
        these = [kill for kill in kills if (kill.role, kill.kind) == (role, kind)]
        known = [kill for kill in these if kill.detected is not None]
        lines.append(
            f"| {role} | {kind} | {len(these)} | {spread([kill.detection for kill in these])} "
            f"| {spread([kill.recovery for kill in these])} | {spread([kill.start for kill in these])} "
            f"| {sum(kill.items for kill in known)} | {sum(kill.rounds for kill in known)} "
            f"| {sum(kill.in_time for kill in known)} of {len(known)} |"
        )
    return lines


def main() -> int:
    """Both runs and the table; 1 where the students differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="as many as kills, at least 6, where not given")
    parser.add_argument("--config", default="demo", help="a recipe's name or file")
    parser.add_argument("-o", "--override", action="append", default=[], help="a value of the recipe, as for train")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    rounds = args.rounds or max(args.kills, 6)
    config = load(args.config, [*QUICK, f"rounds={rounds}", "checkpoint.every=2", *args.override])
    rewarded = bool(config.rewards) and config.evaluation.images_per_task > 0
    roles = ["rollout", "teacher", "learner", *(["reward"] if rewarded else [])]
    chaos = Chaos(plan(args.kills, rounds, roles, args.seed))
    with tempfile.TemporaryDirectory() as folder:
        expected, calm, _ = run_once(config, Path(folder) / "calm", None)
        student, wild, stops = run_once(config, Path(folder) / "chaos", chaos)
    told = [kill for kill in chaos.kills if kill.name]
    lines = [
        *table(told),
        "",
        f"{len(told)} kills in {rounds} rounds, seed {args.seed}: the student is "
        f"{'identical, bit for bit' if student == expected else 'ANOTHER ONE'}; {wild:.0f} s against {calm:.0f} s "
        f"undisturbed ({wild / calm:.1f} times as long); {stops} stops.",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    return int(student != expected or len(told) < args.kills)


if __name__ == "__main__":
    raise SystemExit(main())
