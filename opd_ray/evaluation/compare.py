"""Draw and score every model of a run on the same prompts and first noises, through the run's own workers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opd_ray.actors import SampleRequest
from opd_ray.config import Config, ModelConfig
from opd_ray.errors import RewardError
from opd_ray.evaluation.statistics import gap_closed, mean
from opd_ray.models.teachers import teacher_model
from opd_ray.prompts import PromptStream
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Weights
from opd_ray.runtime.jobs import PROBE, Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.scoring import Judges, Picture, Watch, flat, merged
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
        judges: Judges,
        watch: Watch,
        folder: Path,
        clerk: Pool | None = None,
    ) -> None:
        self.config, self.dispatcher, self.folder = config, dispatcher, folder
        self._clerk, self._written = clerk, list[Job]()
        self.rollout, self.judges, self.watch = rollout, judges, watch
        self.remarks: list[str] = []
        """About the rewards, of the last time."""
        self.failed = Counter[str]()
        """Scores that failed, by model."""
        self.prompts = held_out(prompts, config.evaluation.images_per_task, config.seed)

    def prove(self) -> None:
        """Draw and score one rough picture of each task before any training: a broken reward shows now.

        Raises:
            RewardError: a reward raised, or answered with something else than a number a picture.
        """
        base = replace(contestants(self.config)[0], guidance=1.0)
        jobs = [
            job
            for task, prompts in self.prompts.items()
            for job in self._jobs(base, task, prompts[:1], 0, None, False, steps=1, books=PROBE)
        ]
        self.dispatcher.wait(jobs)
        for name, errors in merged(jobs).errors.items():
            raise RewardError(f"rewards.{name}: scoring a first picture failed: {errors[0]}. Mend it, or take it out")

    def student_means(self, weights: Weights) -> dict[str, float]:
        """The student's mean score by task."""
        scores = self._scores([contestants(self.config)[-1]], weights, self.config.evaluation.steps[0], pictures=False)
        means = {name: mean(values)["value"] for name, values in scores["student"].items()}
        return {name: value for name, value in means.items() if value is not None}

    def final(self, weights: Weights) -> dict[str, Any]:
        """Scores of all models, how much of each teacher's gap is closed, and pictures for the report."""
        models, chosen = contestants(self.config), self.config.evaluation
        self.failed.clear()
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
                "failed": {model: count for model, count in self.failed.items() if count},
                "rewards": self.judges.proofs,
                "remarks": self.remarks,
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
        asked: list[tuple[str, str, int, tuple[Job, ...]]] = []
        for model in models:
            for task, prompts in self.prompts.items():
                for start in range(0, len(prompts), self.config.evaluation.batch):
                    jobs = self._jobs(model, task, prompts, start, weights, pictures, steps=steps)
                    asked.append((model.label, task, start, jobs))
        self.dispatcher.wait([*(job for *_, jobs in asked for job in jobs), *self._written])
        self._written.clear()
        scores: dict[str, dict[str, list[float]]] = {model.label: {} for model in models}
        rows: dict[str, list[Picture]] = {model.label: [] for model in models}
        by_reward: dict[str, list[float]] = {}
        for label, task, start, jobs in asked:
            found, rewards = merged(jobs), self.config.evaluation.rewards.get(task, (task,))
            for key, reward in zip(self.keys(task), rewards, strict=True):
                scores[label].setdefault(key, []).extend(found.scores[reward])
            for name, numbers in found.scores.items():
                by_reward.setdefault(name, []).extend(numbers)
            part = self.prompts[task][start : start + self.config.evaluation.batch]
            rows[label] += [(prompt, 0, found, place) for place, prompt in enumerate(part)]
        self.remarks = flat(by_reward, "the evaluation")
        for text in self.remarks:
            self.watch.note(text)
        for label, of_model in rows.items():
            where = f"the evaluation of {label}"
            self.failed[label] += sum(self.watch.set_aside(of_model, where, model=label, steps=steps).values())
        return scores

    def _jobs(
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
    ) -> tuple[Job, ...]:
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

        def manifest() -> Any:
            return draw.result.value if draw.result else None

        images = Output(draw, 0)
        if self._clerk is not None and files:  # drawing workers do not see the folder
            args, what = lambda: (files, manifest(), images), f"writing {label}"
            write = Job(self._clerk, "pictures", args, 0, what, after=(draw,), books=PROBE)
            self._written.append(self.dispatcher.submit(write))
        return self.judges.score(part, manifest, images, f"scores of {model.label}", books)

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
