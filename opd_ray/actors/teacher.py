"""The teacher actor: a frozen specialist's guided velocity at the student's own states, or what is made of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from opd_ray.algorithms.base import State, own_states
from opd_ray.config import TeacherConfig
from opd_ray.errors import ModelError, NotFiniteError
from opd_ray.models.base import Family
from opd_ray.models.lora import LoraInfo
from opd_ray.models.precision import NAMES
from opd_ray.models.residents import Residents
from opd_ray.models.teachers import Checkpoint, checkpoint_sha256
from opd_ray.types import TeacherAnswer, Trajectory

__all__ = ["TeacherActor", "TeacherFacts"]


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What is known of a teacher, loaded or not; it goes into run.json and the checkpoint."""

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

    def __init__(
        self,
        base: Callable[[TeacherConfig], Family],
        teachers: Mapping[str, TeacherConfig],
        *,
        checkpoints: Mapping[str, Checkpoint] | None = None,
        limit: float | None = None,
        asked: Callable[[Trajectory], Iterable[State]] = own_states,
    ) -> None:
        """Load every LoRA, and as many checkpoints as fit.

        Args:
            base: what a LoRA stands on: the same family for those that may share one.
            teachers: by name.
            checkpoints: of those that are no LoRA.
            limit: bytes of weights to hold at a time; LoRAs and their base always stay.
            asked: ``Algorithm.asked``.

        Raises:
            ModelError: a LoRA or a checkpoint cannot be used as it is, by name.
            PlacementError: a checkpoint can never fit into the limit.
        """
        self.facts: dict[str, TeacherFacts] = {}
        self._checkpoints, self._asked = dict(checkpoints or {}), asked
        self._hosts: dict[str, Family] = {}
        for name, teacher in teachers.items():
            self.facts[name] = (
                self._of_lora(name, teacher, base) if teacher.lora else self._of_checkpoint(name, teacher)
            )
        kept = sum(_weight_bytes(family.network) for family in set(self._hosts.values()))
        self._residents = Residents(self._checkpoints, kept=kept, limit=limit)

    def _of_lora(self, name: str, teacher: TeacherConfig, base: Callable[[TeacherConfig], Family]) -> TeacherFacts:
        assert teacher.lora is not None
        family = self._hosts[name] = base(teacher)
        info = family.load_lora(
            name, teacher.lora, revision=teacher.revision, subfolder=teacher.subfolder, alpha=teacher.alpha
        )
        return TeacherFacts(info.path, info.sha256, teacher.guidance, NAMES[family.dtype], lora=info)

    def _of_checkpoint(self, name: str, teacher: TeacherConfig) -> TeacherFacts:
        one = self._checkpoints[name]
        sha256 = checkpoint_sha256(one.model)
        return TeacherFacts(one.model.path, sha256, teacher.guidance, NAMES[one.dtype], own_text=one.text)

    @property
    def families(self) -> dict[str, Family]:
        """By teacher: what is in memory now."""
        resident = self._residents.loaded
        own = {name: resident[one] for name, one in self._checkpoints.items() if one in resident}
        return self._hosts | own

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the teachers that answer without loading anything."""
        return tuple(self.families)

    @property
    def loading(self) -> float:
        """Seconds spent on loading checkpoints so far."""
        return self._residents.loading

    @property
    def forwards(self) -> int:
        """Rows that went through any of its denoisers, those no longer in memory among them."""
        return sum(family.forwards for family in set(self._hosts.values())) + self._residents.forwards

    def _family(self, teacher: str) -> Family:
        return self._hosts[teacher] if teacher in self._hosts else self._residents.get(self._checkpoints[teacher])

    @torch.no_grad()
    def score(self, trajectory: Trajectory, teacher: str) -> TeacherAnswer:
        """The teacher's velocity at the item's trained steps, one forward batch a step.

        Of a drawing that comes in parts, at those whose state is in this one, which is given the first's conditioning.

        Raises:
            ModelError: its sigma schedule is another one, or its checkpoint cannot be loaded any more.
            NotFiniteError: the answer holds NaN or infinity; names teacher, round and prompts.
        """
        family, facts = self._family(teacher), self.facts[teacher]
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
            velocities = [family.velocity(x, t, cond, uncond, guidance) for x, t in self._asked(there)]
        answer = TeacherAnswer(teacher, steps, torch.stack(velocities, dim=1))
        finite = answer.velocity.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = [prompt.text for prompt, fine in zip(item.prompts, finite.tolist(), strict=True) if not fine]
            raise NotFiniteError(
                f"teacher {teacher} answered NaN or infinity in round {item.round} for {len(bad)} prompts, first "
                f"{bad[0]!r}; check the teacher's weights and precision, then go on with --resume"
            )
        return answer


def _weight_bytes(network: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
