"""The learner ranks: each is given its items as they come; no weight changes before all ranks have all of theirs."""

import tempfile
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_ray.errors import BadInputError, InputLostError, OutOfOrderError, Stopped
from opd_ray.learners import UpdateReport
from opd_ray.learners.engine import LOOPBACK, MEETING
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Call, Done, Handle, RankFacts, Ref, Weights, WorkerSpec
from opd_ray.runtime.hosts import Share
from opd_ray.runtime.jobs import PROBE, Job
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.transport import ObjectStore, Transport
from opd_ray.types import WeightVersion, WorkItem

__all__ = ["Collected", "LearnerGroup"]

MAX_TRIES = 3
UNANSWERED = 2
"""Items that a rank has and has not answered for: the next one travels while it works on one."""
AGAIN = (InputLostError, BadInputError, OutOfOrderError)
"""What a rank refuses an item with, before it has trained on any of it."""


@dataclass(frozen=True, slots=True)
class Collected:
    """One annotated work item, as references."""

    item: WorkItem
    share: Callable[[], Share]
    """The records, once the jobs are done."""
    producers: Mapping[str, tuple[Job, ...]]
    """`trajectory`, `answer`, `recorded` -> jobs whose first arrays it is made of, as ``Share.unpack`` takes them."""
    jobs: tuple[Job, ...]

    def let_go(self) -> None:
        """Its arrays are not needed any longer; their records stay. None of its jobs can run again after that."""
        for job in self.jobs:
            job.call, job.given = None, ()


@dataclass(frozen=True, slots=True)
class _Sent:
    """An item on its way into a rank."""

    collected: Collected
    call: Call
    at: float


class LearnerGroup:
    """Drives the ranks in lockstep."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        specs: Sequence[WorkerSpec],
        *,
        attempt: int,
        start_timeout_s: float,
        beat_timeout_s: float = 60.0,
        transport: Transport | None = None,
        sharded: bool = False,
        clerk: Pool | None = None,
    ) -> None:
        self.dispatcher, self._specs = dispatcher, specs
        self._start_timeout, self._beat_timeout = start_timeout_s, beat_timeout_s
        self._sharded = sharded
        """Whether every rank has to take part where weights or moments are asked of the first."""
        self._clerk = clerk
        """Who reads and writes the run folder where the ranks do not see it."""
        self.version = WeightVersion(attempt, 0, -1)
        self.transport = transport or ObjectStore()
        self.facts = RankFacts("")
        """Of rank 0, once it is up."""
        self._start()

    def _start(self) -> None:
        specs = self._specs
        if len(specs) > 1:
            meeting = _rendezvous(len(specs))
            weakref.finalize(self, Path(meeting[MEETING]).unlink, missing_ok=True)  # ranks that are killed leave it
            # Ray shows a rank its own card alone, which is number 0 to it.
            specs = [
                replace(
                    spec,
                    environment=meeting
                    | {"RANK": str(rank), "LOCAL_RANK": "0" if spec.resources.get("gpu") else str(rank)},
                )
                for rank, spec in enumerate(specs)
            ]
        self.ranks: list[Handle] = self.dispatcher.backend.start_group(specs, self._start_timeout, self.dispatcher.tick)
        self._ready = [rank.call("ready", bulk=0) for rank in self.ranks]
        self._sent = [deque[_Sent]() for _ in self.ranks]
        self._unheard: list[tuple[int, Call]] = []
        """Rank and call of what was sent and not heard of."""
        self._scores: list[tuple[WorkItem, Mapping[str, Sequence[float]]]] = []
        self._free, self._idle = [0.0] * len(self.ranks), [0.0] * len(self.ranks)

    def rebuild(self) -> None:
        """Every rank once more, as at the very start: whoever drives restores a checkpoint then.

        What the former ranks published belongs to an older generation and is drawn with no more.
        """
        self.dispatcher.ranks = None
        self.dispatcher.backend.end_group(self.ranks)
        self.version = WeightVersion(self.version.attempt, self.version.generation + 1, -1)
        self._start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Every rank is up and has the backend it asked for."""
        done = self.dispatcher.results(self._ready, "starting the learner", self._start_timeout)
        self.facts = done[0].value
        self.dispatcher.watch(self.ranks, self._beat_timeout)

    def begin(self, items: Sequence[WorkItem]) -> None:
        """A round begins on every rank; one that was under way is forgotten."""
        self._send_all("begin", list(items))
        self._sent, self._scores = [deque() for _ in self.ranks], []
        self._free, self._idle = [time.perf_counter()] * len(self.ranks), [0.0] * len(self.ranks)

    def take(self, collected: Collected) -> None:
        """Send the round's next item to its rank; waits only where that rank has enough to do.

        Raises:
            Stopped: inputs of an item were lost again and again.
        """
        rank = collected.item.position % len(self.ranks)
        share = collected.share()
        self._scores.append((collected.item, share.told))
        if len(self._sent[rank]) == UNANSWERED:
            self._settle(rank)
        self._sent[rank].append(self._send(rank, collected))

    @property
    def idle(self) -> float:
        """Seconds of this round that the busiest rank waited for items which were not there yet."""
        return min(self._idle)

    @property
    def waited(self) -> float:
        """The same, summed over the ranks."""
        return sum(self._idle)

    def _send(self, rank: int, collected: Collected) -> _Sent:
        calls = [job.call for jobs in collected.producers.values() for job in jobs]
        flats = [call.bulk[0] for call in calls if call is not None]
        now = time.perf_counter()  # before the call, which in `local` is the work itself
        return _Sent(collected, self.ranks[rank].call("take", collected.share(), *flats, bulk=0), now)

    def _settle(self, rank: int) -> None:
        """The rank has its oldest item; where an input is gone or bad, whoever made it runs again first."""
        for _ in range(MAX_TRIES):
            oldest = self._sent[rank][0]
            try:
                done = self._answer(rank, oldest.call, f"taking {oldest.collected.item}", reads=True)
            except AGAIN as error:
                self._repair(rank, error)
                continue
            self._sent[rank].popleft()
            oldest.collected.let_go()
            self.dispatcher.account("learner", done)
            # What the rank did before it, it had done by then; what is left of the time it was idle.
            self._idle[rank] += max(oldest.at - self._free[rank], 0.0)
            self._free[rank] = max(oldest.at, self._free[rank]) + done.seconds
            return
        raise Stopped("inputs of the learner were lost again and again; --resume goes on")

    def _repair(self, rank: int, error: Exception) -> None:
        """Make the inputs of a rank's oldest item once more, and send all that it waits for again, in order."""
        oldest, *behind = self._sent[rank]
        item, producers = oldest.collected.item, oldest.collected.producers
        match error:
            case BadInputError():
                self.dispatcher.note(f"an input of the learner is bad ({error}); it is made again")
                made = producers[error.what]
                for job in made if error.part is None else (made[error.part],):
                    self.dispatcher.blame(job, str(error))
            case InputLostError():
                self.dispatcher.note(f"an input of the learner is gone ({error}); {item} is made again")
                # Ray names one lost object, and its neighbours usually went with it.
                self.dispatcher.again([job for jobs in producers.values() for job in jobs])
        for sent in behind:
            with suppress(*AGAIN):  # it came without the one before it, and was refused
                self._answer(rank, sent.call, f"refusing {sent.collected.item}", reads=True)
        self.dispatcher.wait(oldest.collected.jobs)
        self._sent[rank] = deque(self._send(rank, sent.collected) for sent in (oldest, *behind))

    def update(self, update: int) -> list[UpdateReport]:
        """One optimizer step, once every rank has all of its items; a report a rank."""
        for rank, sent in enumerate(self._sent):
            for _ in range(len(sent)):
                self._settle(rank)
        if self._scores:
            self._send_all("observe", self._scores)
            self._scores = []
        done = self._all("update", update)
        for one in done:
            self.dispatcher.account("learner", one)
        return [one.value for one in done]

    def finish_round(self, round: int) -> None:
        """Extra adapters follow; the round's inputs are let go."""
        self._send_all("finish_round", round)

    def publish(self) -> Weights:
        """The behaviour policy under a new version."""
        last = self.version
        self.version = WeightVersion(last.attempt, last.generation, last.version + 1)
        return self._publish(average=False)

    def average(self) -> Weights:
        """The moving average (raw weights where there is none), for evaluation."""
        return self._publish(average=True)

    def _publish(self, *, average: bool) -> Weights:
        ranks = self.ranks if self._sharded else self.ranks[:1]
        calls = self.transport.publish(ranks, self.version, self.facts.buckets, average=average)
        own = [(number, call) for number, of_rank in enumerate(calls) for call in of_rank]
        answers = self._heard("publishing weights", *own)[-len(own) :]
        return self.transport.published(calls[0], answers[: len(calls[0])])

    def save(self, run_dir: Path, round: int, driver: dict[str, Any], *, attempt: int, keep: int) -> str:
        """A checkpoint, written by rank 0 or through it."""
        if self._clerk is not None:
            flat = self._returned("serialise", "writing a checkpoint", round, driver)
            return str(self._of_clerk("commit", (str(run_dir), round, attempt, keep, flat)).value)
        call = self._first("save", str(run_dir), round, driver, attempt, keep)
        return str(self._answer(0, call, "writing a checkpoint").value)

    def restore(self, run_dir: Path) -> tuple[int, dict[str, Any] | None, list[str]]:
        """The newest valid checkpoint on every rank: its round, the driver's state, notes about damaged ones."""
        if self._clerk is not None:
            return self._taken_back(run_dir)
        found = [done.value for done in self._all("restore", str(run_dir))]
        if any(one[0] != found[0][0] for one in found):
            raise Stopped(f"ranks loaded different checkpoints, rounds {[one[0] for one in found]}")
        round, driver, notes = found[0]
        return round, driver, notes

    def _taken_back(self, run_dir: Path) -> tuple[int, dict[str, Any] | None, list[str]]:
        """As ``restore``, through the clerk; once more where what it read was lost on the way to the ranks."""
        for _ in range(MAX_TRIES):
            job = self._job("newest", (str(run_dir),), bulk=1)
            (round, notes), call = self._wait(job).value, job.call
            assert call is not None
            self._send_all("take_back", call.bulk[0])
            try:
                return round, self._heard("taking the checkpoint", reads=True)[-1].value, notes
            except InputLostError as error:
                self.dispatcher.note(f"the checkpoint was lost on its way to the learner ({error}); it is read again")
        raise Stopped(f"the checkpoint was lost {MAX_TRIES} times on its way to the learner; --resume reads it again")

    def rest(self) -> None:
        """Nobody asks the ranks for anything any more: whether they live is nobody's business either."""
        self.dispatcher.ranks = None

    def hashes(self) -> dict[str, str | None]:
        """Identity of the raw and the averaged student."""
        hashes: dict[str, str | None] = self._all("hashes")[0].value
        return hashes

    def export(self, folder: Path) -> None:
        """Write the LoRA that users load."""
        if self._clerk is not None:
            flat = self._returned("exported", "writing the LoRA")
            self._of_clerk("write", (str(folder), flat))
            return
        self._answer(0, self._first("export", str(folder)), "writing the LoRA")

    def _returned(self, method: str, what: str, *args: Any) -> Ref:
        call = self._first(method, *args, bulk=1)
        self._answer(0, call, what)
        return call.bulk[0]

    def _of_clerk(self, method: str, args: tuple[Any, ...]) -> Done:
        return self._wait(self._job(method, args))

    def _job(self, method: str, args: tuple[Any, ...], bulk: int = 0) -> Job:
        assert self._clerk is not None
        return self.dispatcher.submit(
            Job(self._clerk, method, args, bulk, f"{method} of the run folder", alike=False, books=PROBE)
        )

    def _wait(self, job: Job) -> Done:
        self.dispatcher.wait([job])
        assert job.result is not None
        return job.result

    def _first(self, method: str, *args: Any, bulk: int = 0) -> Call:
        """The first rank does it; where each holds a part of the weights, the others with it."""
        if self._sharded:
            self._unheard += [
                (number, rank.call(method, *args, bulk=bulk)) for number, rank in enumerate(self.ranks[1:], start=1)
            ]
        return self.ranks[0].call(method, *args, bulk=bulk)

    def _all(self, method: str, *args: Any) -> list[Done]:
        self._send_all(method, *args)
        return self._heard(method)[-len(self.ranks) :]

    def _send_all(self, method: str, *args: Any) -> None:
        """Every rank does it next; it is heard of with the next answer that is waited for.

        What needs no answer costs no way to the ranks and back, on which they would have nothing to do.
        """
        self._unheard += [(number, rank.call(method, *args, bulk=0)) for number, rank in enumerate(self.ranks)]

    def _answer(self, rank: int, call: Call, what: str, *, reads: bool = False) -> Done:
        return self._heard(what, (rank, call), reads=reads)[-1]

    def _heard(self, what: str, *own: tuple[int, Call], reads: bool = False) -> list[Done]:
        """The answers to all that was not heard of, and to ``own``."""
        sent, self._unheard = [*self._unheard, *own], []
        return self.dispatcher.results([call for _, call in sent], what, ranks=[rank for rank, _ in sent], reads=reads)


def _rendezvous(ranks: int) -> dict[str, str]:
    """What torch.distributed needs for its ranks to meet on one node, with nothing that others could connect to.

    They meet in a file, since torch's own store listens on every address, and talk over the loopback interface.
    """
    meeting = Path(tempfile.gettempdir()) / f"opd-ray-{uuid.uuid4().hex}"
    return {
        MEETING: str(meeting),
        **LOOPBACK,
        "MASTER_ADDR": "127.0.0.1",  # accelerate asks for one
        "WORLD_SIZE": str(ranks),
    }
