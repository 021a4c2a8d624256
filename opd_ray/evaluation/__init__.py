"""Scores of base, teachers and student on the same prompts and first noises."""

from opd_ray.evaluation.compare import Contestant, Evaluation, contestants
from opd_ray.evaluation.statistics import gap_closed, mean

__all__ = ["Contestant", "Evaluation", "contestants", "gap_closed", "mean"]
