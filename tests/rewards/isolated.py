"""Two rewards that need two versions of one package, which the driver has not."""

import time

import torch

from opd_ray.rewards import Probe, probed


def _bright_and_dark():
    return [Probe((torch.ones(3, 8, 8), "white"), (torch.full((3, 8, 8), 0.5), "grey"))]


@probed(_bright_and_dark)
def old(images, prompts):
    """Its version has a number."""
    import scale_of_rewards

    return images.mean((1, 2, 3)) * scale_of_rewards.FACTOR


@probed(_bright_and_dark)
def new(images, prompts):
    """Its version has a function instead, and no number."""
    import scale_of_rewards

    assert not hasattr(scale_of_rewards, "FACTOR")
    return images.mean((1, 2, 3)) * scale_of_rewards.factor()


@probed(_bright_and_dark)
def sleepy(images, prompts):
    """Never comes back from a picture of a tree."""
    if any("tree" in prompt for prompt in prompts):
        time.sleep(600)
    return images.mean((1, 2, 3))
