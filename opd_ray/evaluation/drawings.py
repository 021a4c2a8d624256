"""What `evaluate` draws: every model at every number of steps, on the same prompts and first noises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opd_ray.actors.rollout import SampleRequest, rows_of
from opd_ray.errors import ConfigError
from opd_ray.evaluation.models import Found
from opd_ray.evaluation.parts import Part
from opd_ray.evaluation.router import ROUTER, Router
from opd_ray.evaluation.versions import fingerprint
from opd_ray.models.base import family_class, resolve
from opd_ray.types import Prompt

__all__ = ["Drawing", "abouts", "anchored", "check_pixels", "drawings", "parts_of", "routed"]

NAMED = 64
"""Characters of a model or a task in a folder's name."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A model in so many steps."""

    label: str
    model: str
    """As it was named on the command line."""
    found: Found
    guidance: float
    steps: int
    tasks: tuple[str, ...] | None = None
    """What it draws; all where None."""

    @property
    def about(self) -> dict[str, Any]:
        """Plain data: which model this is, to the content of its files, and how it draws."""
        parts = {"base": self.found.model.path, "lora": self.found.lora, "denoiser": self.found.denoiser}
        paths = {name: Path(resolve(path)) for name, path in parts.items() if path is not None}
        return {
            "model": self.found.model.model_dump(mode="json"),
            "files": {name: fingerprint(path) for name, path in paths.items() if path.exists()},
            "guidance": self.guidance,
            "steps": self.steps,
        }


def drawings(models: Mapping[str, Found], guidances: Mapping[str, float], steps: Sequence[int]) -> list[Drawing]:
    """Each model at each number of steps; at its own where none is asked for.

    Raises:
        ConfigError: a distilled model does not know one of them.
    """
    found = []
    for name, model in models.items():
        for chosen in map(model.known_steps, steps or [model.steps or 40]):
            label = name if len(steps) < 2 else f"{name}, {chosen} step{'s' * (chosen > 1)}"
            scale = guidances.get(name, 4.5 if model.guidance is None else model.guidance)
            found.append(Drawing(label, name, model, scale, chosen))
    return found


def routed(
    router: Router,
    models: Mapping[str, Found],
    guidances: Mapping[str, float],
    steps: Sequence[int],
    tasks: Sequence[str],
) -> list[Drawing]:
    """A router's specialists, each with its own tasks and all of one name; as ``drawings``.

    Raises:
        ConfigError: a task without a specialist, or the other way round.
    """
    return [
        replace(one, label=ROUTER + one.label.removeprefix(name), tasks=own)
        for name, own in router.routes(tasks).items()
        for one in drawings({name: models[name]}, guidances, steps)
    ]


def abouts(drawn: Sequence[Drawing]) -> dict[str, Any]:
    """Label -> what draws; of a router by its tasks."""
    found: dict[str, Any] = {}
    for one in drawn:
        if one.tasks is None:
            found[one.label] = one.about
        else:
            found.setdefault(one.label, {})[", ".join(one.tasks)] = one.about
    return found


def check_pixels(models: Mapping[str, Found]) -> None:
    """Refuse models whose pictures are of different sizes: neither rewards nor wins would compare like with like.

    Raises:
        ConfigError: two of them.
    """
    sizes: dict[int, str] = {}
    for name, found in models.items():
        shape = family_class(found.model.family).shape(found.model)
        if shape is not None:
            sizes.setdefault(shape.pixels, name)
    if len(sizes) > 1:
        (size, name), (other, second) = list(sizes.items())[:2]
        raise ConfigError(
            f"{name} draws {size} pixels and {second} {other}; give --resolution for all, or evaluate them apart"
        )


def anchored(found: Found, resolution: int | None) -> Found:
    """With absolute paths, since workers of Ray start elsewhere; at another resolution where one is given."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path.partition("/")[0] != "world" and Path(path).exists() else path

    changes: dict[str, Any] = {"path": absolute(found.model.path)}
    changes |= {} if resolution is None else {"resolution": resolution}
    return replace(
        found,
        model=found.model.model_copy(update=changes),
        lora=found.lora and absolute(found.lora),
        denoiser=found.denoiser and absolute(found.denoiser),
    )


def parts_of(
    drawn: Sequence[Drawing],
    prompts: Mapping[str, Sequence[Prompt]],
    folder: Path,
    *,
    images_per_prompt: int,
    seed: int,
    batch: int,
    pictures: int | None,
) -> list[Part]:
    """All of an evaluation: the same forward batches whoever draws them.

    Args:
        drawn: the models.
        prompts: by task.
        folder: of the evaluation; pictures are written below it.
        images_per_prompt: samples 0 to n - 1 of each.
        seed: first noises depend on it, on the prompt's id and on the sample's number alone.
        batch: pictures of a part, and of a forward.
        pictures: prompts of each task whose pictures are written; None: all.
    """
    parts = []
    for number, one in enumerate(drawn):
        place = f"pictures/{number}-{_name(Path(one.model).name)}-{one.steps}"
        for task_number, (task, rows) in enumerate(prompts.items()):
            if one.tasks is not None and task not in one.tasks:
                continue
            every, samples = rows_of(rows, images_per_prompt)
            kept = len(every) if pictures is None else min(pictures * images_per_prompt, len(every))
            for start in range(0, len(every), batch):
                chosen, numbers = every[start : start + batch], samples[start : start + batch]
                request = SampleRequest(one.model, None, one.guidance, one.steps, seed, chosen, numbers)
                files = [
                    f"{place}/{task_number}-{_name(task)}/{row // images_per_prompt:05d}-{sample}.png"
                    if row < kept
                    else None
                    for row, sample in zip(count(start), numbers, strict=False)
                ]
                known = {"seed": seed, "steps": one.steps, "guidance": one.guidance}
                table = tuple({"sample": s, **known, "file": file} for s, file in zip(numbers, files, strict=True))
                args = (request, [str(folder / file) for file in files if file])
                name = f"{number:02d}-{task_number:02d}-{start:07d}"
                parts.append(Part(name, one.label, chosen, table, "sample", args))
    return parts


def _name(text: str) -> str:
    """As a part of a file's name, short enough for every file system; a number before it tells it from others."""
    return quote(text, safe="")[:NAMED]
