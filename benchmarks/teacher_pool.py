"""One shared pool of teachers against a static design: fixed workers for each, and a barrier between the phases.

    python benchmarks/teacher_pool.py --repeats 3

The same fixed-time workers do the same work on the same Ray. The static design is a plain one of our own: it deals each
phase's items to its workers in turn, and waits for all of them before the next phase; each teacher has two of the six
workers. Ours is the run's own code with one pool of six that hold all three LoRA teachers.

mix    eight of ten items are for one teacher
slow   one of six teacher workers takes three times as long
kill   one busy teacher worker is killed (ray.kill)
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fixed_time import Learner, Piece, Rollout, Teacher
from line import CALL_S, SMALL, Line, Times, Workers, backend, cut, middle

from opd_ray.errors import WorkerLostError
from opd_ray.runtime.handle import Call, Done, Weights, WorkerSpec
from opd_ray.types import WeightVersion

TIMES = Times(draw=0.1, mark=0.2, take=0.02)
WORKERS = Workers(4, 6, 1)
UNEVEN, EVEN = {"text": 32, "counts": 4, "looks": 4}, {"text": 14, "counts": 14, "looks": 14}
SLOWER = 3.0


class Static:
    """Fixed workers for each teacher; every phase waits for the one before."""

    def __init__(
        self,
        ray: Any,
        mix: dict[str, int],
        times: Times = TIMES,
        *,
        slow: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ray, self.mix, self.round, self.clock = ray, mix, 0, clock
        each = WORKERS.teacher // len(mix)
        self.rollout = self._start("rollout", partial(Rollout, times.draw), WORKERS.rollout)
        host = partial(Teacher, times.mark, slow=(slow, SLOWER) if slow else None)
        self.teachers = {name: self._start(f"static-{name}", host, each) for name in mix}
        self.learner = self._start("static-learner", partial(Learner, times.take), 1)[0]
        self.wait([handle.call("ready", bulk=0) for handle in self.handles])

    def _start(self, role: str, factory: Any, size: int) -> list[Any]:
        spec = WorkerSpec(role, factory, 1, SMALL)
        return [self.ray.start(spec, f"{role}-{number}") for number in range(size)]

    @property
    def handles(self) -> list[Any]:
        return [*self.rollout, *itertools.chain(*self.teachers.values()), self.learner]

    def wait(self, calls: Sequence[Call]) -> list[Done]:
        """The barrier."""
        pending, found = {call.done for call in calls}, {}
        while pending:
            for ref in self.ray.wait(list(pending), CALL_S):
                pending.discard(ref)
                found[ref] = self.ray.result(ref)
        return [found[call.done] for call in calls]

    def run(self, rounds: int, *, kill_in: int | None = None) -> tuple[list[float], list[float]]:
        """Seconds of each round, and of the marking in it."""
        wholes, marking = [], []
        for number in range(rounds):
            start = self.clock()
            items = cut(self.round, self.mix)
            self.round += 1
            publish = self.learner.call("publish", WeightVersion(0, 0, self.round), False, 0, bulk=1)
            record: Weights = self.wait([publish])[0].value
            self.wait([one.call("bind", record, publish.bulk[0], bulk=0) for one in self.rollout])
            workers = itertools.cycle(self.rollout)
            draws = [next(workers).call("draw", item, *record.identity, bulk=1) for item in items]
            self.wait(draws)
            before = self.clock()
            turns = {name: itertools.cycle(workers) for name, workers in self.teachers.items()}
            marks = [
                next(turns[item.task]).call("score", item, item.task, draw.bulk[0], bulk=1)
                for item, draw in zip(items, draws, strict=True)
            ]
            if number == kill_in:
                time.sleep(TIMES.mark / 2)
                self.teachers["text"][0].kill()
            self.wait(marks)
            marking.append(self.clock() - before)
            flats = [(draw.bulk[0], mark.bulk[0]) for draw, mark in zip(draws, marks, strict=True)]
            takes = zip(items, flats, strict=True)
            self.wait([self.learner.call("take", Piece(item), *both, bulk=0) for item, both in takes])
            self.wait([self.learner.call("update", 0, bulk=0)])
            wholes.append(self.clock() - start)
        return wholes[1:], marking[1:]

    def close(self) -> None:
        """End its workers."""
        for handle in self.handles:
            handle.kill()


class Ours(Line):
    """The run's own code; a busy teacher worker can be killed in the middle of a round."""

    kill_in: int | None = None

    def _arriving(self, batch: Any) -> Any:
        for number, one in enumerate(super()._arriving(batch)):
            if batch.number == self.kill_in and number == self.items // 3:
                busy = next(worker for worker in self.teacher.workers if worker.flying)
                busy.handle.kill()  # nobody is told: the pool finds out
            yield one

    def marking(self) -> float:
        """Seconds of a round's marks on their own."""
        start = self.clock()
        self.dispatcher.wait([self.mark(item) for item in cut(0, self.mix)])
        return self.clock() - start


def mix(ray: Any, args: argparse.Namespace) -> None:
    """Eight of ten items are for one teacher."""
    ours, static = Ours(ray, WORKERS, TIMES, UNEVEN, teacher={"loading": 0.1}), Static(ray, UNEVEN)
    ours.marking()
    found: dict[str, list[float]] = {"marking alone": [], "rounds, staleness 0": [], "rounds, staleness 1": []}
    for _ in range(args.repeats):
        wholes, marking = static.run(args.rounds)
        whole = sum(wholes) / len(wholes)
        found["marking alone"].append(sum(marking) / len(marking) / ours.marking())
        for staleness in (0, 1):
            seconds = ours.run(args.rounds + 3, staleness=staleness)
            found[f"rounds, staleness {staleness}"].append(whole * len(seconds) / sum(seconds))
    for what, ratios in found.items():
        print(f"mix | {what} | the static design takes {middle(ratios)} times as long", flush=True)
    ours.close()
    static.close()


def slow(ray: Any, args: argparse.Namespace) -> None:
    """One of six takes three times as long."""
    with tempfile.TemporaryDirectory() as folder:
        lines = {name: f"{folder}/{name}" for name in ("ours", "static")}
        ours = Ours(ray, WORKERS, TIMES, EVEN, teacher={"slow": (lines["ours"], SLOWER)})
        static = Static(ray, EVEN, slow=lines["static"])
        capacity = (WORKERS.teacher - 1 + 1 / SLOWER) / TIMES.mark
        rates: dict[str, list[float]] = {"ours": [], "static": []}
        for _ in range(args.repeats):
            seconds = ours.run(args.rounds + 3, staleness=1)
            rates["ours"].append(len(seconds) * ours.items / sum(seconds))
            marking = static.run(args.rounds)[1]
            rates["static"].append(len(marking) * ours.items / sum(marking))
        whole = WORKERS.teacher / TIMES.mark
        print(f"slow | {capacity:.1f} of {whole:.1f} marks a second are left")
        print(f"slow | ours, whole rounds: {middle([one / capacity for one in rates['ours']])} of them")
        print(
            f"slow | static, marking alone: {middle([one / capacity for one in rates['static']])} of them", flush=True
        )
        ours.close()
        static.close()


def kill(ray: Any, args: argparse.Namespace) -> None:
    """One busy worker is killed."""
    ours = Ours(ray, WORKERS, TIMES, EVEN)
    rounds = args.rounds + 3
    cost, missing = [], 0
    for _ in range(args.repeats):
        seconds = []
        for killed in (False, True):
            ours.kill_in, ours.answered = ours.round + 3 if killed else None, 0
            start = time.perf_counter()
            ours.run(rounds, staleness=1)
            seconds.append(time.perf_counter() - start)
            missing += rounds * ours.items - ours.answered
        cost.append(seconds[1] - seconds[0])
    print(f"kill | ours: {middle(cost, '.1f')} s more in {rounds} rounds of about {seconds[0] / rounds:.1f} s")
    print(f"kill | ours: {missing} answers missing, {len(ours.teacher.lost)} workers lost in {args.repeats} repeats")
    ours.close()
    static = Static(ray, EVEN)
    try:
        static.run(rounds, kill_in=3)
        print("kill | static: finished")
    except WorkerLostError as error:
        print(f"kill | static: the run ends in round {static.round} of {rounds} ({str(error)[:60]})", flush=True)
    static.close()


def main() -> None:
    """All three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["mix", "slow", "kill"], default=["mix", "slow", "kill"])
    args = parser.parse_args()
    with backend() as ray:
        for name in args.only:
            {"mix": mix, "slow": slow, "kill": kill}[name](ray, args)


if __name__ == "__main__":
    main()
