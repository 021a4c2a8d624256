"""Teachers' own drawings as recorded experience: what a student learns from that does not come from its own policy.

A recording is one work item, cut as a round of the recipe would cut it, and drawn by the task's teacher with its own
guidance, from the noises that the student would draw it with:

    latents   [B, S, C, H, W] float32       the teacher's states, noise first
    velocity  [B, S - 1, C, H, W] float32   its guided velocity at each state that a step begins with
    sigmas    [S] float32
    cond.*    [B, ...]                      what the student's text encoders make of the prompts
    empty.*   [1, ...]                      and of the empty one

Algorithm `sft` learns from the last states, `opd` with ``states: recorded`` from all of them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from opd_ray.algorithms import Algorithm
from opd_ray.config import Config, OpdConfig, TeacherConfig
from opd_ray.diffusion import KERNELS, sample
from opd_ray.errors import ConfigError, NotFiniteError, RunFolderError
from opd_ray.experience import cut
from opd_ray.models.base import Family, family_class, load_family, sigmas_of
from opd_ray.models.lora import read_lora
from opd_ray.models.precision import dtype_of
from opd_ray.models.teachers import checkpoint_sha256, same_text, teacher_model
from opd_ray.prompts import PromptStream
from opd_ray.seeds import fold, noise
from opd_ray.storage.run_folder import differences, read_json, write_atomic, write_json_atomic
from opd_ray.types import Prompt, WorkItem

__all__ = ["Recorder", "check_recording"]

ABOUT = "recording.json"


def check_recording(config: Config) -> None:
    """Whether recorded states are those of the run's own schedule, where the algorithm steps along it.

    Raises:
        ConfigError: they were recorded along another.
    """
    if config.recorded is None or not isinstance(config.algorithm, OpdConfig):
        return
    file = Path(config.recorded) / ABOUT
    sigmas = sigmas_of(config.model, config.sampling.steps).tolist()
    recorded = read_json(file)["sigmas"] if file.is_file() else sigmas
    if recorded != sigmas:
        raise ConfigError(
            f"recorded: the drawings in {config.recorded} have {len(recorded) - 1} steps, which are not the "
            f"{config.sampling.steps} of sampling.steps with this model; set it as it was, or record again"
        )


class Recorder:
    """Draws rounds of a recipe's work items with the teacher of each task, and writes them."""

    def __init__(
        self, config: Config, algorithm: Algorithm, train: Mapping[str, tuple[Prompt, ...]], folder: Path, device: str
    ) -> None:
        """Nothing is loaded yet.

        Args:
            config: a recipe that distils: its teachers, prompts, batch, steps and seed.
            algorithm: of this recipe; its kernel and noise level draw.
            train: the prompts of each task.
            folder: of the recordings, which may hold the first of them.
            device: to draw on.

        Raises:
            RunFolderError: the folder holds something else, or recordings that were made otherwise.
        """
        self.config, self.algorithm, self.folder, self.device = config, algorithm, folder, device
        self.stream = PromptStream(train, config.seed)
        self.sigmas = sigmas_of(config.model, config.sampling.steps)
        about = self._about()
        if (folder / ABOUT).is_file():
            if other := differences(read_json(folder / ABOUT), about):
                raise RunFolderError(
                    f"{folder} holds other recordings: {'; '.join(other)}. Choose another --out, or ask as it was"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty and holds no recordings; choose another --out")
        self.about: dict[str, Any] = about

    def _about(self) -> dict[str, Any]:
        config = self.config
        batch, algorithm = config.batch.model_dump(), self.algorithm
        teachers = {
            name: {"sha256": _sha256(config, name, teacher), "guidance": teacher.guidance, "path": teacher.path}
            for name, teacher in config.teachers.items()
        }
        return {
            "model": config.model.path,
            "seed": config.seed,
            "sigmas": self.sigmas.tolist(),
            "kernel": algorithm.kernel,
            "noise_level": algorithm.noise_level,
            "batch": batch,
            "teachers": teachers,
            "prompts": self.stream.digests(),
        }

    def left(self, rounds: int) -> list[WorkItem]:
        """The items of these rounds that are not there yet, a teacher's after one another."""
        items = [
            item
            for round in range(rounds)
            for item in cut(self.config, self.algorithm, self.stream, round)
            if not self._file(item).is_file()
        ]
        return sorted(items, key=lambda item: self.stream.tasks.index(item.task))

    def record(self, items: list[WorkItem]) -> Iterator[WorkItem]:
        """Draw and write these; each is given once it is there.

        Raises:
            NotFiniteError: a teacher drew NaN or infinity.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.folder / ABOUT, self.about)
        base = self._load(None, text=True)
        names = dict.fromkeys(self.config.teacher_of_task[item.task] for item in items)
        for name in names:
            teacher = self.config.teachers[name]
            family = self._teacher(name, teacher, base)
            for item in (item for item in items if self.config.teacher_of_task[item.task] == name):
                tensors = self.draw(family, base, item, teacher.guidance)
                if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                    raise NotFiniteError(
                        f"teacher {name} drew NaN or infinity in {item}, first prompt {item.prompts[0].text!r}; check "
                        "its weights and precision"
                    )
                file = self._file(item)
                file.parent.mkdir(exist_ok=True)
                write_atomic(file, save(tensors))
                yield item

    @torch.no_grad()
    def draw(self, family: Family, base: Family, item: WorkItem, guidance: float) -> dict[str, Tensor]:
        """One recording: the path of whatever is in use in ``family``; ``base`` encodes for the student."""
        texts = [prompt.text for prompt in item.prompts]
        told, empty = base.encode(texts), base.empty()
        own = family.encodes and family is not base
        cond, uncond = (family.encode(texts), family.empty()) if own else (told, empty)
        seed, kernel, level = self.config.seed, KERNELS[self.algorithm.kernel], self.algorithm.noise_level
        rows = [(prompt.id, number) for prompt, number in zip(item.prompts, item.samples, strict=True)]

        def drawn(seeds: list[int]) -> Tensor:
            return noise(seeds, family.latent_shape).to(family.device)

        begin = [fold(seed, "init_noise", item.round, *row) for row in rows]
        x = family.initial(drawn(begin), self.sigmas)
        states, velocities = [x], list[Tensor]()
        for j in range(len(self.sigmas) - 1):
            t, t_next = float(self.sigmas[j]), float(self.sigmas[j + 1])
            velocity = family.velocity(x, t, cond, uncond if guidance != 1 else {}, guidance)
            step = kernel(x, velocity, t, t_next, level)
            seeds = [fold(seed, "step_noise", item.round, *row, j) for row in rows]
            x = sample(step, drawn(seeds)) if level > 0 else step.mean
            states.append(x)
            velocities.append(velocity)
        path = {
            "latents": torch.stack(states, dim=1),
            "velocity": torch.stack(velocities, dim=1),
            "sigmas": self.sigmas,
        }
        path |= {f"cond.{name}": tensor for name, tensor in told.items()}
        path |= {f"empty.{name}": tensor for name, tensor in empty.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in path.items()}

    def _teacher(self, name: str, teacher: TeacherConfig, base: Family) -> Family:
        """The base under its LoRA, or its own checkpoint."""
        if teacher.lora is None:
            return self._load(teacher, text=not same_text(self.config.model, teacher_model(self.config.model, teacher)))
        own = teacher.precision not in {None, self.config.precision.teacher}
        family = self._load(teacher, text=False) if own else base
        family.load_lora(
            name, teacher.lora, revision=teacher.revision, subfolder=teacher.subfolder, alpha=teacher.alpha
        )
        family.use(name)
        return family

    def _load(self, teacher: TeacherConfig | None, *, text: bool) -> Family:
        precision = (teacher.precision if teacher else None) or self.config.precision.teacher
        model = teacher_model(self.config.model, teacher) if teacher else self.config.model
        return load_family(model, text=text, image=False, device=self.device, dtype=dtype_of(precision, self.device))

    def _file(self, item: WorkItem) -> Path:
        return self.folder / item.task / f"{item.round:06d}-{item.index:03d}.safetensors"


def _sha256(config: Config, name: str, teacher: TeacherConfig) -> str:
    if teacher.lora is None:
        return checkpoint_sha256(teacher_model(config.model, teacher))
    part = family_class(config.model.family).denoiser_part
    where = {"revision": teacher.revision, "subfolder": teacher.subfolder}
    return read_lora(name, teacher.lora, part=part, alpha=teacher.alpha, **where).sha256
