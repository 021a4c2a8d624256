"""The teacher actor: a frozen specialist's guided velocity at the student's own states."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opd_ray.config import TeacherConfig
from opd_ray.errors import ModelError, NotFiniteError
from opd_ray.models.base import Family
from opd_ray.models.lora import LoraInfo
from opd_ray.types import TeacherAnswer, Trajectory

__all__ = ["TeacherActor", "TeacherFacts"]


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What is known of a loaded teacher; it goes into run.json and the checkpoint."""

    guidance: float
    lora: LoraInfo


class TeacherActor:
    """One frozen base with one or several teacher LoRAs over it, unmerged, each with its own guidance."""

    def __init__(self, family: Family, teachers: Mapping[str, TeacherConfig]) -> None:
        self.family = family
        self.facts: dict[str, TeacherFacts] = {}
        for name, teacher in teachers.items():
            info = family.load_lora(name, teacher.lora, revision=teacher.revision, subfolder=teacher.subfolder)
            self.facts[name] = TeacherFacts(teacher.guidance, info)

    @torch.no_grad()
    def score(self, trajectory: Trajectory, teacher: str) -> TeacherAnswer:
        """The teacher's velocity at the item's trained steps, one forward batch a step.

        Raises:
            NotFiniteError: the answer holds NaN or infinity; names teacher, round and prompts.
        """
        if not torch.equal(self.family.sigmas(len(trajectory.sigmas) - 1), trajectory.sigmas):
            raise ModelError(f"teacher {teacher}'s sigma schedule is not the trajectory's; use the student's base")
        item, guidance = trajectory.item, self.facts[teacher].guidance
        with self.family.adapter(teacher):
            velocities = [
                self.family.velocity(
                    trajectory.latents[:, j], float(trajectory.sigmas[j]), trajectory.cond, trajectory.uncond, guidance
                )
                for j in item.steps
            ]
        answer = TeacherAnswer(teacher, item.steps, torch.stack(velocities, dim=1))
        finite = answer.velocity.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [prompt.text for prompt, fine in zip(item.prompts, finite.tolist(), strict=True) if not fine]
            raise NotFiniteError(
                f"teacher {teacher} answered NaN or infinity in round {item.round} for {len(bad)} prompts, first "
                f"{bad[0]!r}; check the teacher's weights and precision, then go on with --resume"
            )
        return answer
