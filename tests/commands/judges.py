"""A reward of the tests that fails where it is told to."""

import os
import sys

import torch


def moody(images, prompts):
    if os.environ.get("MOOD") == "bad" and any("dogs" in prompt for prompt in prompts):
        raise ValueError("not in the mood")
    return images.std(dim=(1, 2, 3))


moody.weights = {"mood.bin": "00ff"}


def talkative(images, prompts):
    """A package that tells the world of its progress."""
    sys.stdout.write(f"scoring {len(prompts)}\n")
    return images.std(dim=(1, 2, 3))


def told(images, prompts, metadata):
    """What its prompt's row says."""
    return torch.tensor([float(row["level"]) for row in metadata])
