"""Draw and score every model of a run on the same prompts and first noises, through the run's own workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opd_ray.actors import SampleRequest
from opd_ray.config import Config, ModelConfig
from opd_ray.evaluation.statistics import gap_closed, mean
from opd_ray.models.teachers import teacher_model
from opd_ray.prompts import PromptStream
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Weights
from opd_ray.runtime.jobs import PROBE, Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.storage.run_folder import write_json_atomic
from opd_ray.types import Prompt

__all__ = ["Contestant", "Evaluation", "contestants"]

PICTURES_PER_TASK = 4
"""Rows of the report's grid."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model to draw with. ``label`` is base, teacher:<name> or student."""

    label: str
    model: str
    guidance: float
    lora: tuple[str, str | None, str | None, float | None] | None = None
    checkpoint: ModelConfig | None = None


def contestants(config: Config) -> list[Contestant]:
    """Base, every teacher at its own guidance, and the student."""
    own = config.student.guidance
    teachers = [
        Contestant(
            f"teacher:{name}",
            name,
            teacher.guidance,
            (teacher.lora, teacher.revision, teacher.subfolder, teacher.alpha) if teacher.lora else None,
            None if teacher.lora else teacher_model(config.model, teacher),
        )
        for name, teacher in config.teachers.items()
    ]
    return [Contestant("base", "base", own), *teachers, Contestant("student", "student", own)]


def held_out(prompts: Mapping[str, Sequence[Prompt]], count: int, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """The same prompts for every model: the first ``count`` of each task in a seeded order, none twice."""
    stream = PromptStream(prompts, seed, weighted=False)
    return {task: stream.take(task, 0, min(count, len(prompts[task])))[0] for task in prompts}


class Evaluation:
    """Which pictures are drawn, who draws and scores them, and what is made of the scores."""

    def __init__(
        self,
        config: Config,
        prompts: Mapping[str, Sequence[Prompt]],
        dispatcher: Dispatcher,
        *,
        rollout: Pool,
        reward: Pool,
        folder: Path,
        clerk: Pool | None = None,
    ) -> None:
        self.config, self.dispatcher, self.folder = config, dispatcher, folder
        self._clerk, self._written = clerk, list[Job]()
        self.rollout, self.reward = rollout, reward
        self.prompts = held_out(prompts, config.evaluation.images_per_task, config.seed)

    def prove(self) -> None:
        """Draw and score one rough picture of each task before any training: a broken reward shows now.

        Raises:
            RewardError: a reward answered with something else than a number a picture.
        """
        base = replace(contestants(self.config)[0], guidance=1.0)
        jobs = [
            self._job(base, task, prompts[:1], 0, None, False, steps=1, books=PROBE)
            for task, prompts in self.prompts.items()
        ]
        self.dispatcher.wait(jobs)

    def student_means(self, weights: Weights) -> dict[str, float]:
        """The student's mean score by task."""
        scores = self._scores([contestants(self.config)[-1]], weights, self.config.evaluation.steps[0], pictures=False)
        means = {name: mean(values)["value"] for name, values in scores["student"].items()}
        return {name: value for name, value in means.items() if value is not None}

    def final(self, weights: Weights) -> dict[str, Any]:
        """Scores of all models, how much of each teacher's gap is closed, and pictures for the report."""
        models, chosen = contestants(self.config), self.config.evaluation
        first, *others = dict.fromkeys(chosen.steps)
        scores = self._scores(models, weights, first, pictures=True)
        self._index(models)
        closed = {}
        for task, name in self.config.teacher_of_task.items():
            if task in self.prompts and self.keys(task):
                value = gap_closed(scores["base"][task], scores[f"teacher:{name}"][task], scores["student"][task])
                if value is not None:
                    closed[task] = value
        return {
            "scores": _means(scores),
            "scores_at": {str(steps): _means(self._scores(models, weights, steps, pictures=False)) for steps in others},
            "gap_closed": closed,
            "evaluation": {
                "guidance": {model.label: model.guidance for model in models},
                "steps": first,
                "seed": self.config.seed,
                "images_per_task": chosen.images_per_task,
            },
        }

    def keys(self, task: str) -> list[str]:
        """Names of a task's scores: the task itself for the one that measures its gap, else ``task:reward``."""
        rewards = self.config.evaluation.rewards.get(task, (task,))
        plain = rewards[:1] if task in self.config.teacher_of_task or len(rewards) == 1 else ()
        return [task if reward == task or reward in plain else f"{task}:{reward}" for reward in rewards]

    def _scores(
        self, models: Sequence[Contestant], weights: Weights, steps: int, *, pictures: bool
    ) -> dict[str, dict[str, list[float]]]:
        """Model -> score key -> one number a prompt, of pictures drawn in so many steps."""
        jobs: list[tuple[str, str, Job]] = []
        for model in models:
            for task, prompts in self.prompts.items():
                for start in range(0, len(prompts), self.config.evaluation.batch):
                    job = self._job(model, task, prompts, start, weights, pictures, steps=steps)
                    jobs.append((model.label, task, job))
        self.dispatcher.wait([*(job for _, _, job in jobs), *self._written])
        self._written.clear()
        scores: dict[str, dict[str, list[float]]] = {model.label: {} for model in models}
        for label, task, job in jobs:
            assert job.result is not None
            rewards = self.config.evaluation.rewards.get(task, (task,))
            for key, reward in zip(self.keys(task), rewards, strict=True):
                scores[label].setdefault(key, []).extend(job.result.value[reward])
        return scores

    def _job(
        self,
        model: Contestant,
        task: str,
        prompts: Sequence[Prompt],
        start: int,
        weights: Weights | None,
        pictures: bool,
        *,
        steps: int,
        books: str = "evaluation",
    ) -> Job:
        part = tuple(prompts[start : start + self.config.evaluation.batch])
        bound = weights if model.label == "student" else None
        request = SampleRequest(
            model.model,
            model.lora,
            model.guidance,
            steps,
            self.config.seed,
            part,
            (0,) * len(part),
            (bound.version, bound.sha256) if bound else None,
            model.checkpoint,
        )
        shown = range(start, min(start + len(part), PICTURES_PER_TASK)) if pictures else ()
        files = [str(self.folder / self._file(model, task, index)) for index in shown]
        label = f"pictures of {model.label}"
        own = files if self._clerk is None else []
        draw = Job(self.rollout, "sample", (request, own), 1, label, weights=bound, books=books, alike=False)
        self.dispatcher.submit(draw)

        def reader(pool: Pool, method: str, first: list[str], what: str, books: str) -> Job:
            """Is given the pictures, behind something of its own."""
            return self.dispatcher.submit(
                Job(
                    pool,
                    method,
                    lambda: (first, draw.result.value if draw.result else None, Output(draw, 0)),
                    0,
                    what,
                    after=(draw,),
                    books=books,
                )
            )

        if self._clerk is not None and files:  # drawing workers do not see the folder
            self._written.append(reader(self._clerk, "pictures", files, f"writing {label}", PROBE))
        return reader(self.reward, "score", [prompt.text for prompt in part], f"scores of {model.label}", books)

    def _file(self, model: Contestant, task: str, index: int) -> str:
        return f"{model.label.replace(':', '-')}/{quote(task, safe='')}-{index:03d}.png"  # a task may hold a slash

    def _index(self, models: Sequence[Contestant]) -> None:
        rows = [
            {
                "task": task,
                "prompt": prompt.text,
                "seed": self.config.seed,
                "images": {model.label: self._file(model, task, index) for model in models},
            }
            for task, prompts in self.prompts.items()
            for index, prompt in enumerate(prompts[:PICTURES_PER_TASK])
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.folder / "index.json", {"models": [model.label for model in models], "rows": rows})


def _means(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Model -> score key -> mean with its interval."""
    return {model: {key: mean(values) for key, values in by_key.items()} for model, by_key in scores.items()}
