"""What one learner rank does, as plain classes: nothing here knows Ray."""

from opd_ray.learners.engine import DdpEngine, Engine
from opd_ray.learners.learner import Learner, LearnerState, UpdateReport

__all__ = ["DdpEngine", "Engine", "Learner", "LearnerState", "UpdateReport"]
