"""Where experience comes from: rollouts (the student draws) or recordings. The loop does not know which.

A source cuts a round into work items from the configuration and the round's number alone, and turns them into jobs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opd_ray.algorithms import Algorithm
from opd_ray.answers import drawn_for, marked_for
from opd_ray.config import Config
from opd_ray.pairs.index import PairIndex
from opd_ray.prompts import PromptStream
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import Collected
from opd_ray.runtime.handle import Weights
from opd_ray.runtime.hosts import Share
from opd_ray.runtime.jobs import Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.scoring import Judges, merged
from opd_ray.storage.packing import TrajectoryRecord
from opd_ray.types import Prompt, WeightVersion, WorkItem

__all__ = ["ExperienceSource", "PairSource", "RecordedSource", "RolloutSource", "Round", "recorded_stream"]


@dataclass(frozen=True, slots=True)
class Round:
    """A round of experience under way."""

    number: int
    version: WeightVersion
    """What it is drawn with."""
    items: tuple[WorkItem, ...]
    collected: tuple[Collected, ...]

    @property
    def jobs(self) -> list[Job]:
        """Everything that has to be answered before it can be trained on."""
        return [job for one in self.collected for job in one.jobs]


class ExperienceSource(Protocol):
    """One batch of experience a round."""

    def collect(self, round: int, weights: Weights) -> Round:
        """Begin a round; nothing is waited for."""
        ...

    def cursors(self, round: int) -> dict[str, int]:
        """Prompts of each task that were consumed before this round."""
        ...

    def prompts(self) -> dict[str, str]:
        """Task -> hash of all that there is to take, in its order."""
        ...


def cut(config: Config, algorithm: Algorithm, stream: PromptStream, round: int) -> tuple[WorkItem, ...]:
    """The work items of a round, in (task, item) order: a pure function of the configuration and the round."""
    batch, items = config.batch, list[WorkItem]()
    each = batch.item_size // batch.images_per_prompt
    for task in _tasks(config, stream.tasks, round):
        drawn = Counter[str]()  # a prompt that comes twice in a round is drawn at another noise
        for index in range(batch.images_per_task // batch.item_size):
            cursor = _cursor(config, stream.tasks, task, round) + index * each
            chosen, _ = stream.take(task, cursor, each)
            prompts = tuple(prompt for prompt in chosen for _ in range(batch.images_per_prompt))
            samples = tuple(_count(drawn, prompt.id) for prompt in prompts)
            steps = algorithm.steps(config.sampling.steps, config.seed, round, task, index)
            items.append(WorkItem(round, task, index, len(items), prompts, samples, steps))
    return tuple(items)


def _count(drawn: Counter[str], name: str) -> int:
    """How often a name was drawn before."""
    drawn[name] += 1
    return drawn[name] - 1


def _tasks(config: Config, tasks: Sequence[str], round: int) -> Sequence[str]:
    """The tasks that a round draws."""
    return tasks if config.batch.tasks == "together" else (tasks[round % len(tasks)],)


def _cursor(config: Config, tasks: Sequence[str], task: str, round: int) -> int:
    """Prompts of a task that were consumed before a round."""
    rounds = round if config.batch.tasks == "together" else (round - tasks.index(task) - 1) // len(tasks) + 1
    return rounds * (config.batch.images_per_task // config.batch.images_per_prompt)


class RolloutSource:
    """Draw with the behaviour policy, then mark and score what was drawn, item by item."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        stream: PromptStream,
        dispatcher: Dispatcher,
        *,
        rollout: Pool,
        teachers: Mapping[str, Pool],
        judges: Judges | None,
    ) -> None:
        self.config, self.algorithm, self.stream, self.dispatcher = config, algorithm, stream, dispatcher
        self.rollout, self.judges = rollout, judges if algorithm.needs_rewards else None
        self.teachers = teachers if algorithm.needs_teachers else {}
        self.routes = config.teacher_of_task

    def collect(self, round: int, weights: Weights) -> Round:
        """Queue every item's draw, and behind it its mark and its scores."""
        items = cut(self.config, self.algorithm, self.stream, round)
        return Round(round, weights.version, items, tuple(self._item(item, weights) for item in items))

    def cursors(self, round: int) -> dict[str, int]:
        """Prompts of each task that were consumed before this round."""
        tasks = self.stream.tasks
        return {task: _cursor(self.config, tasks, task, round) for task in tasks}

    def prompts(self) -> dict[str, str]:
        """Task -> hash of its prompts."""
        return self.stream.digests()

    def _item(self, item: WorkItem, weights: Weights) -> Collected:
        whole = self.algorithm.whole_paths or self.judges is not None
        last = self.config.sampling.steps if whole else max(item.steps) + self.algorithm.needs_velocities
        # Whoever looks at a whole drawing gets it whole.
        chunks = self.config.cluster.step_chunks if self.teachers and not self.algorithm.needs_velocities else 1
        runs = cut_states(item.steps, last, chunks)
        draws = self._draw(item, runs, weights)
        marks = self._mark(item, runs, draws) if self.teachers else ()
        scores = self._score(item, draws[-1]) if self.judges is not None else ()
        producers = {"trajectory": draws, "answer": marks}
        return Collected(item, _share(item, draws, marks, scores), producers, (*draws, *marks, *scores))

    def _draw(self, item: WorkItem, runs: Sequence[range], weights: Weights) -> tuple[Job, ...]:
        """A job for each part, which takes up where the part before it ended, on any worker."""
        draws: list[Job] = []
        for states in runs:
            images = self.judges is not None and states is runs[-1]
            args = (item, weights.version, weights.sha256, states[-1], images)
            parts = tuple(dict.fromkeys((draws[0], draws[-1]))) if draws else ()
            label = f"drawing {_named(item, states, runs)}"
            job = Job(self.rollout, "draw", _with_parts(args, parts), 2, label, after=parts, weights=weights)
            job.check = drawn_for(item, weights.version, states, velocities=self.algorithm.needs_velocities)
            draws.append(self._submit(job))
        return tuple(draws)

    def _mark(self, item: WorkItem, runs: Sequence[range], draws: Sequence[Job]) -> tuple[Job, ...]:
        """A job for each part that has trained steps; the conditioning is in the first part."""
        teacher, marks = self.routes[item.task], list[Job]()
        for states, draw in zip(runs, draws, strict=True):
            if any(step in states for step in item.steps):
                parts = tuple(dict.fromkeys((draws[0], draw)))
                label = f"{teacher} marking {_named(item, states, runs)}"
                args = _with_teacher(parts, teacher)
                job = Job(self.teachers[teacher], "score", args, 1, label, after=parts, asset=teacher)
                job.check = marked_for(item, teacher, states)
                marks.append(self._submit(job))
        return tuple(marks)

    def _score(self, item: WorkItem, draw: Job) -> tuple[Job, ...]:
        assert self.judges is not None
        prompts = [prompt for prompt in item.prompts for _ in range(self.algorithm.pictures)]
        return self.judges.score(prompts, lambda: _value(draw).images, Output(draw, 1), f"scoring {item}")

    def _submit(self, job: Job) -> Job:
        return self.dispatcher.submit(job)


def cut_states(steps: Sequence[int], last: int, chunks: int) -> tuple[range, ...]:
    """The states of each part of a drawing: equal runs of steps up to the last trained one, then on to ``last``.

    A mark needs the state that its step begins with, so the part that ends with a state has its step.
    """
    needed = max(steps)
    count = max(min(chunks, needed), 1)
    ends = [-(-needed * number // count) for number in range(1, count)] + [last]
    return tuple(range(first, end + 1) for first, end in zip([0, *(end + 1 for end in ends)], ends, strict=False))


def _named(item: WorkItem, states: range, runs: Sequence[range]) -> str:
    return str(item) if len(runs) == 1 else f"{item}, states {states[0]} to {states[-1]}"


def _with_parts(args: tuple[Any, ...], parts: tuple[Job, ...]) -> tuple[Any, ...] | Callable[[], tuple[Any, ...]]:
    """A draw's arguments, with the parts that came before."""
    if not parts:
        return args
    return lambda: (*args, _trajectories(parts), *(Output(part, 0) for part in parts))


def _with_teacher(parts: tuple[Job, ...], teacher: str) -> Callable[[], tuple[Any, ...]]:
    """A mark's arguments."""
    return lambda: (_trajectories(parts), teacher, *(Output(part, 0) for part in parts))


def _trajectories(draws: Sequence[Job]) -> tuple[TrajectoryRecord, ...]:
    return tuple(_value(draw).trajectory for draw in draws)


def _share(item: WorkItem, draws: Sequence[Job], marks: Sequence[Job], scores: Sequence[Job]) -> Callable[[], Share]:
    return lambda: Share(
        item,
        trajectory=_trajectories(draws),
        answer=tuple(_value(mark) for mark in marks),
        scores=merged(scores) if scores else None,
        remarks=_value(draws[-1]).remarks,
    )


def _value(job: Job) -> Any:
    assert job.result is not None
    return job.result.value


def recorded_stream(recordings: Mapping[str, Sequence[str]], seed: int) -> PromptStream:
    """The order in which recordings are read: by task, and each of them a prompt by its name."""
    return PromptStream(
        {task: tuple(Prompt(name, name, task) for name in names) for task, names in recordings.items()}, seed
    )


class RecordedSource:
    """Read recordings, each a work item, in a seeded order that visits all of them once an epoch."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        recordings: Mapping[str, Sequence[str]],
        dispatcher: Dispatcher,
        reader: Pool,
    ) -> None:
        self.config, self.algorithm, self.dispatcher, self.reader = config, algorithm, dispatcher, reader
        self.stream = recorded_stream(recordings, config.seed)
        self.items_per_task = config.batch.images_per_task // config.batch.item_size

    def collect(self, round: int, weights: Weights) -> Round:
        """Queue the reading of this round's recordings."""
        items, collected = list[WorkItem](), list[Collected]()
        for task, cursor in self.cursors(round).items():
            prompts, _ = self.stream.take(task, cursor, self.items_per_task)
            for index, prompt in enumerate(prompts):
                steps = self.algorithm.steps(self.config.sampling.steps, self.config.seed, round, task, index)
                item = WorkItem(round, task, index, len(items), (prompt,), (0,), steps)
                read = Job(self.reader, "read", (task, prompt.id), 1, f"reading {item}")
                self.dispatcher.submit(read)
                items.append(item)
                collected.append(Collected(item, _recorded(item, read), {"recorded": (read,)}, (read,)))
        return Round(round, weights.version, tuple(items), tuple(collected))

    def cursors(self, round: int) -> dict[str, int]:
        """Recordings of each task that were consumed before this round."""
        return dict.fromkeys(self.stream.tasks, round * self.items_per_task)

    def prompts(self) -> dict[str, str]:
        """Task -> hash of the names of its recordings."""
        return self.stream.digests()


def _recorded(item: WorkItem, read: Job) -> Callable[[], Share]:
    return lambda: Share(item, recorded=_value(read))


class PairSource:
    """Read preference pairs, an item's number of them after the other; which, is the reader's business."""

    def __init__(
        self, config: Config, algorithm: Algorithm, index: PairIndex, dispatcher: Dispatcher, reader: Pool
    ) -> None:
        assert config.pairs is not None
        self.config, self.algorithm, self.dispatcher, self.reader = config, algorithm, dispatcher, reader
        self.index, self.task = index, config.pairs.task

    def collect(self, round: int, weights: Weights) -> Round:
        """Queue the reading of this round's pairs."""
        items, collected = list[WorkItem](), list[Collected]()
        size = self.config.batch.item_size
        for index in range(self.config.batch.images_per_task // size):
            number = self.cursors(round)[self.task] // size + index
            steps = self.algorithm.steps(self.config.sampling.steps, self.config.seed, round, self.task, index)
            rows = (Prompt(f"{self.task}-{number}", f"pairs {number}", self.task),) * size
            item = WorkItem(round, self.task, index, index, rows, tuple(range(size)), steps)
            read = self.dispatcher.submit(Job(self.reader, "read", (number,), 1, f"reading {item}"))
            items.append(item)
            collected.append(Collected(item, _paired(item, read), {"recorded": (read,)}, (read,)))
        return Round(round, weights.version, tuple(items), tuple(collected))

    def cursors(self, round: int) -> dict[str, int]:
        """Pairs that were consumed before this round."""
        return {self.task: round * self.config.batch.images_per_task}

    def prompts(self) -> dict[str, str]:
        """Hash of which rows of which files count."""
        return {self.task: self.index.digest()}


def _paired(item: WorkItem, read: Job) -> Callable[[], Share]:
    return lambda: Share(item, recorded=_value(read).manifest)
