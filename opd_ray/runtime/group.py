"""The learner ranks: all of them take a round's inputs before any of them changes a weight."""

import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_ray.errors import InputLostError, Stopped
from opd_ray.learners import UpdateReport
from opd_ray.learners.engine import MEETING
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Call, Done, Handle, Weights, WorkerSpec
from opd_ray.runtime.hosts import Share
from opd_ray.runtime.jobs import Job, Output
from opd_ray.types import WeightVersion, WorkItem

__all__ = ["Collected", "LearnerGroup"]

MAX_TRIES = 3


@dataclass(frozen=True, slots=True)
class Collected:
    """One annotated work item, as references."""

    share: Callable[[], Share]
    """The records, once the jobs are done."""
    bulk: tuple[Output, ...]
    """Arrays in the order that ``Share.unpack`` takes them."""
    jobs: tuple[Job, ...]


class LearnerGroup:
    """Drives the ranks in lockstep."""

    def __init__(
        self, dispatcher: Dispatcher, specs: Sequence[WorkerSpec], *, attempt: int, start_timeout_s: float
    ) -> None:
        self.dispatcher = dispatcher
        self.version = WeightVersion(attempt, 0, -1)
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
        self.ranks: list[Handle] = dispatcher.backend.start_group(specs, start_timeout_s)
        self._ready = [rank.call("ready", bulk=0) for rank in self.ranks]
        self._start_timeout = start_timeout_s
        self.precision = ""
        """What the ranks compute in, once they are up."""

    def wait_ready(self) -> None:
        """Every rank is up and has the backend it asked for."""
        done = self.dispatcher.results(self._ready, "starting the learner", self._start_timeout)
        self.precision = str(done[0].value)

    def stage(self, items: Sequence[WorkItem], collected: Sequence[Collected]) -> None:
        """Bring a round to the ranks; where an input is gone, the item that made it runs again first."""
        for _ in range(MAX_TRIES):
            try:
                self.dispatcher.results(self._send(items, collected), "staging a round")
            except InputLostError as error:
                self.dispatcher.note(f"an input of the learner is gone ({error}); its items run again")
                self.dispatcher.again(_lost(collected))
                self.dispatcher.wait([job for one in collected for job in one.jobs])
            else:
                return
        raise Stopped("inputs of the learner were lost again and again; --resume goes on")

    def _send(self, items: Sequence[WorkItem], collected: Sequence[Collected]) -> list[Call]:
        shares = [one.share() for one in collected]
        scores = [share.scores or {} for share in shares]
        calls = []
        for rank, handle in enumerate(self.ranks):
            mine = [n for n, item in enumerate(items) if item.position % len(self.ranks) == rank]
            flats = [
                output.job.call.bulk[output.index] for n in mine for output in collected[n].bulk if output.job.call
            ]
            calls.append(handle.call("stage", list(items), scores, [shares[n] for n in mine], *flats, bulk=0))
        return calls

    def update(self, update: int) -> list[UpdateReport]:
        """One optimizer step; a report a rank."""
        done = self._all("update", update)
        for one in done:
            self.dispatcher.account("learner", one)
        return [one.value for one in done]

    def finish_round(self, round: int) -> None:
        """Extra adapters follow; the round's inputs are let go."""
        self._all("finish_round", round)

    def publish(self) -> Weights:
        """The behaviour policy under a new version."""
        last = self.version
        self.version = WeightVersion(last.attempt, last.generation, last.version + 1)
        return self._publish(average=False)

    def average(self) -> Weights:
        """The moving average (raw weights where there is none), for evaluation."""
        return self._publish(average=True)

    def _publish(self, *, average: bool) -> Weights:
        call = self.ranks[0].call("publish", self.version, average, bulk=1)
        (done,) = self.dispatcher.results([call], "publishing weights")
        record: Weights = done.value
        return replace(record, flat=call.bulk[0])

    def save(self, run_dir: Path, round: int, driver: dict[str, Any], *, attempt: int, keep: int) -> str:
        """A checkpoint, written by rank 0."""
        call = self.ranks[0].call("save", str(run_dir), round, driver, attempt, keep, bulk=0)
        return str(self.dispatcher.results([call], "writing a checkpoint")[0].value)

    def restore(self, run_dir: Path) -> tuple[int, dict[str, Any] | None, list[str]]:
        """The newest valid checkpoint on every rank: its round, the driver's state, notes about damaged ones."""
        found = [done.value for done in self._all("restore", str(run_dir))]
        if any(one[0] != found[0][0] for one in found):
            raise Stopped(f"ranks loaded different checkpoints, rounds {[one[0] for one in found]}")
        round, driver, notes = found[0]
        return round, driver, notes

    def hashes(self) -> dict[str, str | None]:
        """Identity of the raw and the averaged student."""
        hashes: dict[str, str | None] = self._all("hashes")[0].value
        return hashes

    def export(self, folder: Path) -> None:
        """Write the LoRA that users load."""
        self.dispatcher.results([self.ranks[0].call("export", str(folder), bulk=0)], "writing the LoRA")

    def _all(self, method: str, *args: Any) -> list[Done]:
        return self.dispatcher.results([rank.call(method, *args, bulk=0) for rank in self.ranks], method)


def _lost(collected: Sequence[Collected]) -> list[Job]:
    """Every producer of the round's arrays: Ray names one lost object, and its neighbours usually went with it."""
    return list(dict.fromkeys(output.job for one in collected for output in one.bulk))


def _rendezvous(ranks: int) -> dict[str, str]:
    """What torch.distributed needs for its ranks to meet on one node, with nothing that others could connect to.

    They meet in a file, since torch's own store listens on every address, and talk over the loopback interface.
    """
    meeting = Path(tempfile.gettempdir()) / f"opd-ray-{uuid.uuid4().hex}"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        MEETING: str(meeting),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "MASTER_ADDR": "127.0.0.1",  # accelerate asks for one
        "WORLD_SIZE": str(ranks),
    }
