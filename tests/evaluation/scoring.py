"""Rewards of the tests' comparisons."""

import torch

from opd_ray.rewards import Probe, probed


def bright_and_dark():
    """A bright picture is the better one, whatever its prompt."""
    white, black = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    return [Probe((white, "white"), (black, "black"))]


@probed(bright_and_dark)
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def noisy_and_flat():
    """A noisy picture is the better one."""
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [Probe((noise, "noise"), (torch.ones(3, 8, 8), "flat"))]


@probed(noisy_and_flat)
def contrast(images, prompts):
    return images.flatten(1).std(1)
