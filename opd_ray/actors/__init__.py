"""What one worker does, as plain classes: nothing here knows Ray."""

from opd_ray.actors.reward import RewardActor
from opd_ray.actors.rollout import Ack, Policy, RolloutActor, SampleRequest
from opd_ray.actors.teacher import TeacherActor

__all__ = ["Ack", "Policy", "RewardActor", "RolloutActor", "SampleRequest", "TeacherActor"]
