"""The teacher actor: a frozen specialist's guided velocity at the student's own states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from opd_ray.config import TeacherConfig
from opd_ray.errors import ModelError, NotFiniteError
from opd_ray.models.base import Family
from opd_ray.models.lora import LoraInfo
from opd_ray.models.precision import NAMES
from opd_ray.models.teachers import checkpoint_sha256
from opd_ray.types import TeacherAnswer, Trajectory

__all__ = ["TeacherActor", "TeacherFacts"]


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What is known of a loaded teacher; it goes into run.json and the checkpoint."""

    path: str
    sha256: str
    """Of the LoRA's file, or of the checkpoint's denoiser files."""
    guidance: float
    precision: str
    lora: LoraInfo | None = None
    own_text: bool = False
    """Its text encoders are not the student's: it encodes the prompts for itself."""


class TeacherActor:
    """Frozen teachers: LoRAs over a shared base, unmerged, and full checkpoints, each with its own guidance."""

    def __init__(self, base: Callable[[TeacherConfig], Family], teachers: Mapping[str, TeacherConfig]) -> None:
        """``base`` gives what a teacher stands on: the same family for those that may share one."""
        self.families: dict[str, Family] = {}
        self.facts: dict[str, TeacherFacts] = {}
        for name, teacher in teachers.items():
            family = self.families[name] = base(teacher)
            info = None
            if teacher.lora is not None:
                info = family.load_lora(
                    name, teacher.lora, revision=teacher.revision, subfolder=teacher.subfolder, alpha=teacher.alpha
                )
            self.facts[name] = TeacherFacts(
                path=info.path if info else family.model.path,
                sha256=info.sha256 if info else checkpoint_sha256(family.model),
                guidance=teacher.guidance,
                precision=NAMES[family.dtype],
                lora=info,
                own_text=teacher.lora is None and family.encodes,
            )

    @property
    def forwards(self) -> int:
        """Rows that went through any of its denoisers."""
        return sum(family.forwards for family in set(self.families.values()))

    @torch.no_grad()
    def score(self, trajectory: Trajectory, teacher: str) -> TeacherAnswer:
        """The teacher's velocity at the item's trained steps, one forward batch a step.

        Of a drawing that comes in parts, at those whose state is in this one, which is given the first's conditioning.

        Raises:
            NotFiniteError: the answer holds NaN or infinity; names teacher, round and prompts.
        """
        family, facts = self.families[teacher], self.facts[teacher]
        if not torch.equal(family.sigmas(len(trajectory.sigmas) - 1), trajectory.sigmas):
            raise ModelError(f"teacher {teacher}'s sigma schedule is not the trajectory's; use the student's base")
        item, guidance = trajectory.item, facts.guidance
        steps = tuple(j for j in item.steps if trajectory.first <= j <= trajectory.last)
        there = trajectory.to(family.device)
        cond, uncond = there.cond, there.uncond
        if facts.own_text:
            cond = family.encode([prompt.text for prompt in item.prompts])
            uncond = family.empty() if guidance != 1 else {}
        with family.adapter(teacher if facts.lora else None):
            velocities = [
                family.velocity(there.state(j), float(trajectory.sigmas[j]), cond, uncond, guidance) for j in steps
            ]
        answer = TeacherAnswer(teacher, steps, torch.stack(velocities, dim=1))
        finite = answer.velocity.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [prompt.text for prompt, fine in zip(item.prompts, finite.tolist(), strict=True) if not fine]
            raise NotFiniteError(
                f"teacher {teacher} answered NaN or infinity in round {item.round} for {len(bad)} prompts, first "
                f"{bad[0]!r}; check the teacher's weights and precision, then go on with --resume"
            )
        return answer
