"""Rewards of the tests' runs."""

import os
import time

import torch

from opd_ray.rewards import Probe, probed


def bright_and_dark():
    """A bright picture is the better one, whatever its prompt."""
    white, black = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
    return [Probe((white, "white"), (black, "black"))]


@probed(bright_and_dark)
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@probed(bright_and_dark)
def patient(images, prompts):
    """The same, in a time in which something can happen to the run; none of its own pictures while $HOLD is there."""
    while images.shape[-1] > 8 and os.path.exists(os.environ.get("HOLD", "")):
        time.sleep(0.05)
    time.sleep(0.5)
    return brightness(images, prompts)


def never(images, prompts):
    """A reward that applies to no prompt."""
    return torch.full((len(images),), torch.nan)


def total(images, prompts):
    """A reward that forgets that it is asked about several pictures."""
    return float(images.sum())


def greenness(images, prompts):
    """In steps of a tenth, so that compression makes no difference."""
    return (10 * images[:, 1].std(dim=(1, 2))).round() / 10


def constant(images, prompts):
    """A reward that likes everything as much."""
    return torch.full((len(images),), 22.3)


def broken(images, prompts):
    """A reward whose judge is not there."""
    raise ConnectionError("the judge is away")
