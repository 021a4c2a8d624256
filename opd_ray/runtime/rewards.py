"""The host of rewards: it needs no model of ours, so that its process may have another environment."""

import time
from collections.abc import Callable, Sequence

from opd_ray.actors.reward import RewardActor
from opd_ray.errors import BadInputError
from opd_ray.rewards.versions import packages
from opd_ray.runtime.handle import Done
from opd_ray.storage.packing import Flat, Manifest, unpack
from opd_ray.types import Prompt

__all__ = ["RewardHost"]


class RewardHost:
    """Scores pictures."""

    def __init__(self, make: Callable[[], RewardActor]) -> None:
        self.actor = make()

    def ready(self) -> Done:
        """The rewards it holds, each with how it has just proven itself."""
        return Done(self.actor.prove(), 0.0, 0)

    def about(self) -> Done:
        """The files that each scores with, and the versions of what is in its environment."""
        weights = {name: scorer.weights for name, scorer in self.actor.rewards.items()}
        return Done((weights, packages()), 0.0, 0)

    def score(self, prompts: Sequence[Prompt], manifest: Manifest, flat: Flat) -> Done:
        """Reward -> one number a picture, small enough to travel as a record."""
        start = time.perf_counter()
        images = unpack(flat, manifest)["images"]
        if images.shape[:2] != (len(prompts), 3):
            raise BadInputError("images", f"pictures of shape {list(images.shape)} for {len(prompts)} prompts")
        for image, prompt in zip(images, prompts, strict=True):
            if not image.isfinite().all():
                raise BadInputError("images", f"NaN or infinity in the picture of {prompt.text!r}")
        scored = self.actor.score(images, prompts)
        return Done(scored, time.perf_counter() - start, 0)
