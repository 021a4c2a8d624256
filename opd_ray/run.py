"""A run's own business around the loop: waiting, metrics, checkpoints, evaluation, result."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ray.algorithms import Algorithm
from opd_ray.config import Config
from opd_ray.errors import (
    DriftError,
    LearnerLostError,
    NotFiniteError,
    PlacementError,
    RunFolderError,
    Stopped,
    TooManyFailedError,
)
from opd_ray.evaluation import Evaluation
from opd_ray.experience import ExperienceSource, Round
from opd_ray.learners import UpdateReport
from opd_ray.metrics import MetricsLog, rows
from opd_ray.models.base import trained_folder
from opd_ray.planning.advice import advice_for_run
from opd_ray.report.advice import store_advice
from opd_ray.report.card import write_card
from opd_ray.report.html import write_report
from opd_ray.report.live import Live
from opd_ray.report.run_folder import Round as RoundRow
from opd_ray.rows import TimeBooks, learned, scored_pictures, scores_of, ties_alone, told_of, told_of_pairs
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import Collected, LearnerGroup
from opd_ray.runtime.handle import Weights
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.scaling import Scaler
from opd_ray.runtime.usage import Meter
from opd_ray.scoring import Watch
from opd_ray.storage.control import serve
from opd_ray.storage.run_folder import locked, newest_attempt, overwrite_json, read_json, write_json_atomic

__all__ = ["Run"]

MAX_REBUILDS = 3
"""Of the learner, without a finished round in between."""


@dataclass(slots=True)
class Run:
    """What ``train`` drives."""

    config: Config
    folder: Path
    attempt: int
    algorithm: Algorithm
    dispatcher: Dispatcher
    source: ExperienceSource
    learner: LearnerGroup
    evaluation: Evaluation | None
    log: MetricsLog
    live: Live
    facts: dict[str, Any]
    """What is known of teachers and packages, for run.json and result.json."""
    scaler: Scaler
    books: TimeBooks
    meter: Meter
    watch: Watch
    watchers: Sequence[Callable[[list[dict[str, Any]]], None]] = ()
    """Told about once a second how every role stands."""
    rounds_in_store: int = 10**6
    """How many may be under way at once for the object store's sake."""
    round: int = 0
    stopping: bool = False
    """Set by Ctrl-C or SIGTERM: finish this round, write a checkpoint, stop."""
    stop_by: float = math.inf
    """On the monotonic clock: when whoever asked to stop will not wait any longer."""
    totals: dict[str, dict[str, float]] = field(default_factory=lambda: {"seconds": {}, "forwards": {}})
    _seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)
    _waiting: list[Job] = field(default_factory=list)
    _rebuilt: int = 0
    """How often the learner was, since the last round that was finished for the first time."""
    _furthest: int = 0
    _told_status: bool = False
    _told_ties: bool = False
    _failed: dict[str, int] = field(default_factory=dict)
    """How often each reward failed in this round."""

    @property
    def rounds(self) -> int:
        """Rounds in the whole run."""
        return self.config.rounds

    @property
    def max_staleness(self) -> int:
        """Rounds that may be drawn ahead: as many as asked for, unless the object store has no room for them."""
        return min(self.config.cluster.max_staleness, self.rounds_in_store - 1)

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """Where a learner rank is lost inside, its group starts again from the last checkpoint, and so does the run.

        Raises:
            Stopped: it was lost again and again without a finished round in between.
            DriftError: a round is not to be trained on; a checkpoint from before it was written.
        """
        try:
            yield
        except DriftError:
            self.dispatcher.abandon()
            self.save()
            raise
        except LearnerLostError as error:
            self._recover(error)

    def _recover(self, error: LearnerLostError) -> None:
        while True:
            self._rebuilt += 1
            if self.stopping or self._rebuilt > MAX_REBUILDS:
                raise Stopped(f"{error}; --resume goes on from the last checkpoint") from None
            self.live.note(f"{error}; the learner starts again from the last checkpoint")
            self.dispatcher.abandon()
            self.dispatcher.seconds.clear()  # of rounds that are done again
            self.dispatcher.forwards.clear()
            try:
                self.learner.rebuild()
                self._restore()
            except LearnerLostError as another:
                error = another
            except PlacementError as lack:
                raise Stopped(f"{error}, and has no place to start again: {lack}; --resume goes on") from None
            else:
                return

    @contextmanager
    def arrivals(self, batch: Round) -> Iterator[Iterator[Collected]]:
        """A round's items in their order, each once it is there. Nothing is trained inside.

        Raises:
            NotFiniteError: an answer is not a number; a checkpoint from before this round was written.
            TooManyFailedError: a reward failed on more pictures than it may; likewise.
        """
        self._since = time.perf_counter()
        self._waiting, self.watch.round = batch.jobs, batch.number
        try:
            yield self._arriving(batch)
            self._failed = self.watch.set_aside(scored_pictures(batch), f"round {batch.number + 1}")
        except (NotFiniteError, TooManyFailedError):
            self.dispatcher.abandon()
            self.save()  # gradients are no state: this round can begin again
            raise
        finally:
            self._waiting = []

    def _arriving(self, batch: Round) -> Iterator[Collected]:
        for one in batch.collected:
            self.dispatcher.wait(one.jobs)
            yield one

    def resume(self, *, force: bool = False) -> None:
        """Go on where another attempt ended.

        Args:
            force: also where prompts or teachers are not those of before.

        Raises:
            RunFolderError: they are not.
        """
        driver = self._restore()
        if driver is not None:
            self._require_same(driver, force)
            for line in self.scaler.restore(driver.get("targets", {})):
                self.live.note(line)

    def _restore(self) -> dict[str, Any] | None:
        """Take the newest valid checkpoint, or begin anew where there is none; returns the driver's part of it."""
        self.round, driver, notes = self.learner.restore(self.folder)
        for note in notes:
            self.live.note(note)
        if driver is None:
            self.live.note("no checkpoint to resume from: starting at round 0")
        else:
            self.live.note(f"going on after round {self.round} of {self.rounds}")
        self.totals = driver["totals"] if driver is not None else {"seconds": {}, "forwards": {}}
        self.log.truncate_from(self.round)
        self.watch.log.truncate_from(self.round)
        return driver

    def _require_same(self, driver: Mapping[str, Any], force: bool) -> None:
        """What was trained with until then is what is here. Where it lies may have changed."""
        for what, before, now in (
            ("prompts of", driver["prompts"], self.source.prompts()),
            ("file of teacher", driver["teachers"], self._teachers()),
        ):
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) == now.get(name):
                    continue
                text = f"{self.folder}: the {what} {name!r} are not those of round {self.round}"
                if not force:
                    raise RunFolderError(f"{text}; put them back, start another run, or add --force")
                self.live.note(f"{text}; going on with --force")

    def _teachers(self) -> dict[str, str]:
        """Teacher -> sha256 of its file."""
        return {name: facts["sha256"] for name, facts in self.facts["teachers"].items()}

    def finish_round(self, batch: Round, updates: Sequence[Sequence[UpdateReport]], weights: Weights) -> None:
        """Write the round's row, and what is due after it."""
        now = time.perf_counter()
        staleness = weights.version.version - 1 - batch.version.version
        row = learned(batch, updates)
        row |= {"staleness": staleness, "weight_version": str(weights.version)}
        row |= {"busy": dict(self.dispatcher.seconds), "forwards": dict(self.dispatcher.forwards)}
        self._seconds["round"] = now - self._since
        # Items arrive while the learner works on those before: only what it waited for itself is lost time.
        self._seconds["wait"] = self.learner.idle
        self._seconds["update"] = max(self._seconds["round"] - self._seconds["wait"], 0.0)
        row["seconds"] = dict(self._seconds)
        if self.config.cluster.runtime == "ray":  # in one process nobody waits for anybody
            of_learner = {"round": now - self._since, "learner": self.dispatcher.seconds.get("learner", 0.0)}
            row["roles"] = self.books.round(of_learner)
        store = self.dispatcher.backend.object_store()
        if store is not None:
            row["store"] = {"used": store.used, "spilled": store.spilled}
        self.books.close()
        self._book()
        self.round = batch.number + 1
        self._remark(batch, row)
        every = self.config.evaluation.every
        if self.evaluation is not None and every and self.round % every == 0 and self.round < self.rounds:
            row["evaluation"] = self._evaluate(self.evaluation, row)
        with locked(self.folder):  # under it no newer attempt can start before the row is there to be cut
            self._require_newest()
            self.log.append(row)
        self.live.round(row)
        self._seconds.clear()
        if self.stopping or self.round % self.config.checkpoint.every == 0 or self.round == self.rounds:
            self.save()
        if self.round > self._furthest:  # not one that was only done again
            self._furthest, self._rebuilt = self.round, 0
        if self.stopping and self.round < self.rounds:
            raise Stopped(f"stopped after round {self.round} of {self.rounds}; --resume goes on from there")

    def _evaluate(self, evaluation: Evaluation, row: dict[str, Any]) -> dict[str, float]:
        """The student's scores; where too many fail, what was trained is kept first."""
        try:
            found = evaluation.student_means(self.learner.average())
        except TooManyFailedError:
            self.log.append(row)
            self.save()
            raise
        self._book()
        return found

    def _remark(self, batch: Round, row: dict[str, Any]) -> None:
        """What of a round a person should know at once."""
        if self._failed:
            row["failed"] = self._failed
        if same := self.watch.same(scores_of(batch)):
            row["remarks"] = same
        for line in told_of(row, self.config.teacher_of_task, tied_before=self._told_ties):
            self.live.note(line)
        self._told_ties |= ties_alone(row)

    def _book(self) -> None:
        """Add what the workers did since the last time to the run's totals."""
        for kind, used in (("seconds", self.dispatcher.seconds), ("forwards", self.dispatcher.forwards)):
            for role, amount in used.items():
                self.totals[kind][role] = self.totals[kind].get(role, 0) + amount
            used.clear()

    def save(self) -> None:
        """A checkpoint that resumes at the current round."""
        start = time.perf_counter()
        driver = {
            "cursors": self.source.cursors(self.round),
            "prompts": self.source.prompts(),
            "teachers": self._teachers(),
            "attempt": self.attempt,
            "identity_sha256": read_json(self.folder / "run.json")["identity_sha256"],
            "totals": self.totals,
            "targets": self.scaler.state(),
        }
        self.learner.save(self.folder, self.round, driver, attempt=self.attempt, keep=self.config.checkpoint.keep)
        self._seconds["checkpoint"] = time.perf_counter() - start

    def finish(self) -> dict[str, Any]:
        """What was trained, the scores, the result and the report."""
        ema, updates = self.config.ema, self.rounds * self.algorithm.student_updates
        trained = trained_folder(self.config.model, self.config.student)
        if ema is not None and updates < ema.every:
            self.live.note(
                f"no average was taken in {updates} optimizer steps, since ema.every is {ema.every}: {trained}/ holds "
                "the last weights"
            )
        self.learner.export(self.folder / trained)
        if text := told_of_pairs(rows(self.folder / "metrics.jsonl")):
            self.live.note(text)
        result = self.result("done")
        if self.evaluation is not None:
            self.live.phase(f"evaluating base{', teachers' if self.config.teachers else ''} and student")
            average, self.watch.round = self.learner.average(), self.rounds
            self.learner.rest()
            result |= self.evaluation.final(average)
            self._book()
        result["advice"] = self._advice()
        write_json_atomic(self.folder / "result.json", result)
        write_card(self.folder)
        self.status("done")
        write_report(self.folder)
        return result

    def _advice(self) -> list[str]:
        """Who waited for whom, and what to change, as sentences."""
        workers = self.scaler.targets() | {"learner": len(self.learner.ranks)}
        stored = store_advice(map(RoundRow.read, rows(self.folder / "metrics.jsonl")), self.max_staleness)
        found = [advice_for_run(self.folder, workers, self.max_staleness), stored]
        for sentence in filter(None, found):
            self.live.note(sentence)
        return [sentence for sentence in found if sentence]

    def stop(self, why: str, status: str = "stopped") -> None:
        """Note an early end, unless a newer attempt has the folder; the last checkpoint stays."""
        if newest_attempt(self.folder) != self.attempt:
            return
        try:
            self.status(status)
            write_json_atomic(self.folder / "result.json", self.outcome(status) | {"why": why})
        except OSError as error:
            self.live.note(f"{error.filename}: its end cannot be written ({error.strerror})")

    def tick(self) -> None:
        """What is due once a second while workers are at work.

        Raises:
            Stopped: the round takes longer than whoever asked to stop will wait.
            RunFolderError: a newer attempt has the folder.
        """
        if time.monotonic() > self.stop_by:
            raise Stopped("stopped at once, since Ray waits no longer; --resume goes on from the last checkpoint")
        for line in [*serve(self.folder, self.scaler.request), *self.scaler.tick()]:
            self.live.note(line)
        try:
            self.status()
        except OSError as error:  # a full disk, or one that is away for a moment, ends no run by its heartbeat
            if not self._told_status:
                self.live.note(f"status.json cannot be written ({error.strerror}); the run goes on")
            self._told_status = True
        if self._waiting:
            self.live.within(sum(job.done for job in self._waiting), len(self._waiting))

    def status(self, status: str = "running") -> None:
        """The heartbeat.

        Raises:
            RunFolderError: a newer attempt has the folder; this one must leave it alone.
        """
        self._require_newest()
        beat = {"status": status, "round": self.round, "rounds": self.rounds, "attempt": self.attempt}
        found = self.meter.roles()
        for watcher in self.watchers:
            watcher(found)
        beat |= {"time": time.time(), "pid": os.getpid(), "roles": found, "waiting": None}
        if (paused := self.dispatcher.paused()) is not None and paused[1] >= 1:
            role, seconds, why = paused
            beat["waiting"] = {"for": role, "since": time.time() - seconds, "why": why}
        try:
            write_json_atomic(self.folder / "status.json", beat)
        except OSError:
            if status == "running":  # the next one comes in a second
                raise
            overwrite_json(self.folder / "status.json", beat)

    def _require_newest(self) -> None:
        if (newest := newest_attempt(self.folder)) != self.attempt:
            raise RunFolderError(f"{self.folder}: attempt {newest} has taken over; attempt {self.attempt} ends here")

    def result(self, status: str) -> dict[str, Any]:
        """Identity and cost of what was trained; scores are added to it."""
        return self.outcome(status) | self.learner.hashes()

    def outcome(self, status: str) -> dict[str, Any]:
        """What is known without asking a worker."""
        return {
            "status": status,
            "rounds": self.round,
            "weight_version": str(self.learner.version),
            "scores": {},
            "gap_closed": {},
            "seconds": self.totals["seconds"],
            "forwards": self.totals["forwards"],
            "teachers": {
                name: {"tasks": list(teacher.tasks or (name,)), "guidance": teacher.guidance}
                for name, teacher in self.config.teachers.items()
            },
        }
