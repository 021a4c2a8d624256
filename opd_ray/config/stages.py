"""The stage before a distillation: runs that train its specialists."""

from typing import Any

from pydantic import Field, field_validator

from opd_ray.config.section import Frozen

__all__ = ["SPECIALISTS", "STUDENT", "SpecialistConfig"]

SPECIALISTS = "specialists/"
"""Beginning of a teacher's LoRA that is yet to be trained."""
STUDENT = "student"
"""The stage that distils; its run folder stands beside those of the specialists."""
FIXED = ("name", "cluster", "cluster.runtime", "specialists")


class SpecialistConfig(Frozen):
    """A run of its own, before this one, that makes a teacher. All train at the same time, each on its own workers."""

    recipe: str = Field(min_length=1)
    """What trains it: a recipe's name, or the path of a YAML file, as seen from this one or from where you start it.
    Seed and cluster are this run's in place of its own, where `set` does not say otherwise."""
    set: dict[str, Any] = {}
    """Keys of that recipe and their values here, with dots as in `-o`: {rounds: 20, cluster.rollout.workers: 1}. A
    section that is named is replaced as a whole."""

    @field_validator("set")
    @classmethod
    def _its_own(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        if wrong := [key for key in chosen if key in FIXED]:
            raise ValueError(f"{wrong[0]} is the same for all stages; take it out, and set it of the whole run")
        return chosen
