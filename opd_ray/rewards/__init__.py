"""Rewards: pictures and prompts to scores. Built-in by short name, yours by package.module:attr."""

from opd_ray.rewards.base import REWARDS, Reward, make_rewards

__all__ = ["REWARDS", "Reward", "make_rewards"]
