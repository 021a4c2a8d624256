"""A reward of the tests that fails where it is told to."""

import os

import torch


def moody(images, prompts):
    if os.environ.get("MOOD") == "bad" and any("dogs" in prompt for prompt in prompts):
        raise ValueError("not in the mood")
    return images.std(dim=(1, 2, 3))


moody.weights = {"mood.bin": "00ff"}


def told(images, prompts, metadata):
    """What its prompt's row says."""
    return torch.tensor([float(row["level"]) for row in metadata])
