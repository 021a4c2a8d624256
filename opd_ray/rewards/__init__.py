"""Rewards: pictures and prompts to scores. Built-in by short name, yours by package.module:attr."""

from opd_ray.rewards.base import REWARDS, Reward, Scorer, make_rewards
from opd_ray.rewards.probes import Probe, probed

__all__ = ["REWARDS", "Probe", "Reward", "Scorer", "make_rewards", "probed"]
