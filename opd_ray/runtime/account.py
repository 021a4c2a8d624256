"""Books of a pool's time: at work, on the way, waiting for input, waiting for output."""

from collections.abc import Callable
from dataclasses import replace

from opd_ray.runtime.health import State
from opd_ray.runtime.jobs import Queue
from opd_ray.runtime.roster import Worker
from opd_ray.runtime.usage import Usage

__all__ = ["Account"]


class Account:
    """Integrates over time what changes at each event; every event costs the same, however many workers there are."""

    def __init__(self, clock: Callable[[], float], queue: Queue) -> None:
        self._clock, self._queue = clock, queue
        self._at = clock()
        self._up: set[Worker] = set()
        self._working: set[Worker] = set()
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """Until now."""
        self.advance()
        return self._usage

    @property
    def answers(self) -> int:
        """How many there were."""
        return self._usage.answers

    @property
    def pace(self) -> float:
        """Mean seconds of an answer."""
        return self._usage.busy / self._usage.answers if self._usage.answers else 0.0

    def advance(self) -> None:
        """Book the time since the last event; to be called before anything changes."""
        now, was = self._clock(), self._usage
        passed, self._at = now - self._at, now
        if passed <= 0:
            return
        idle = passed * max(len(self._up) - len(self._working), 0)  # only who is up gets work
        waits = len(self._queue) > 0
        self._usage = replace(
            was,
            seconds=was.seconds + passed,
            workers=was.workers + passed * len(self._up),
            input=was.input + (idle if waits else 0.0),
            output=was.output + (0.0 if waits else idle),
            queued=was.queued + (passed if self._queue.ready else 0.0),
        )

    def begin(self, worker: Worker) -> None:
        """It is about to get something."""
        self.advance()
        if not worker.flying:
            worker.since = self._at
        self._working.add(worker)

    def end(self, worker: Worker, seconds: float, *, answered: bool) -> None:
        """It answered the first thing that it had, ``seconds`` of which were work."""
        self.advance()
        spent = self._at - worker.since
        self._usage = replace(
            self._usage,
            busy=self._usage.busy + seconds,
            transfer=self._usage.transfer + max(spent - seconds, 0.0),
            answers=self._usage.answers + answered,
        )

    def settle(self, worker: Worker) -> None:
        """Its state or load changed."""
        self.advance()
        (self._working.add if worker.flying else self._working.discard)(worker)
        present = worker.up or (worker.health.state is State.DRAINING and bool(worker.flying))
        (self._up.add if present else self._up.discard)(worker)
