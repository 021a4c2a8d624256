"""A role under load, in simulated time: what a pool would count, and the size that autoscale gives it."""

import math
from collections import deque
from dataclasses import dataclass, field

from opd_ray.runtime.autoscale import Autoscaler
from opd_ray.runtime.usage import Usage

STEP_S = 0.5


@dataclass
class Steady:
    """Work that comes at a constant pace, whatever the workers do."""

    rate: float
    """Jobs a second."""
    service_s: float
    due: float = 0.0

    def arrivals(self, idle: bool) -> int:
        self.due += self.rate * STEP_S
        came, self.due = int(self.due), self.due % 1
        return came


@dataclass
class Rounds:
    """Work that comes all at once, and the next only some time after all of it is done, as strict on-policy does."""

    items: int
    service_s: float
    gap_s: float
    rest: float = 0.0

    def arrivals(self, idle: bool) -> int:
        if not idle:
            return 0
        self.rest -= STEP_S
        if self.rest > 0:
            return 0
        self.rest = self.gap_s
        return self.items


@dataclass
class Simulation:
    """Workers that take jobs from a queue; new ones need some time to start."""

    limits: object
    size: int
    load: object
    start_s: float = 20.0
    room: int = 1000
    """More workers than these find none: after a while the growth is taken back."""
    now: float = 0.0
    jobs: deque = field(default_factory=deque)
    running: list = field(default_factory=list)
    """Seconds left of each job under way."""
    starting: list = field(default_factory=list)
    up: int = 0
    used: Usage = field(default_factory=Usage)
    sizes: list = field(default_factory=list)
    """(time, size) of each change."""

    def __post_init__(self):
        self.up = self.first = self.size
        self.autoscaler = Autoscaler(self.limits)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def step(self) -> None:
        self.now += STEP_S
        self.starting = [left - STEP_S for left in self.starting]
        came_up = sum(left <= 0 for left in self.starting)
        self.starting = [left for left in self.starting if left > 0]
        if self.up + came_up > self.room:
            self.size = self.up = self.room
            self.note()
        else:
            self.up += came_up
        self.jobs.extend([self.load.service_s] * self.load.arrivals(not self.jobs and not self.running))
        while self.jobs and len(self.running) < self.up:
            self.running.append(self.jobs.popleft())
        self.running = [left - STEP_S for left in self.running]
        ended = sum(left <= 0 for left in self.running)
        job_s = STEP_S * math.ceil(self.load.service_s / STEP_S)
        self.running = [left for left in self.running if left > 0]
        before = self.used
        self.used = Usage(
            seconds=self.now,
            workers=before.workers + STEP_S * self.up,
            busy=before.busy + ended * job_s,
            queued=before.queued + STEP_S * bool(self.jobs),
            answers=before.answers + ended,
        )
        wanted = self.autoscaler.decide(self.size, self.used, settled=not self.starting)
        if wanted > self.size:
            self.starting += [self.start_s] * (wanted - self.size)
        elif wanted < self.size:
            self.up = wanted  # those that are over the number finish what they hold
        if wanted != self.size:
            self.size = wanted
            self.note()

    def note(self) -> None:
        self.sizes.append((self.now, self.size))

    @property
    def turns(self) -> list[float]:
        """When a shrink was undone."""
        before, shrunk, found = self.first, False, []
        for time, size in self.sizes:
            if size > before and shrunk:
                found.append(time)
            before, shrunk = size, size < before
        return found
