"""GenEval: whether a picture shows the objects, counts, colours and positions of its row in the prompt file.

The rules are in geneval_rules.py, the models in geneval_detector.py and geneval_colours.py. The three scores of one
worker share the models and each batch's detections. There are no probe pairs: no picture that code can draw is one
that a detector of photographs is sure about, so `probe: finite` has to be set.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_ray.errors import PromptError
from opd_ray.rewards.geneval_colours import Colours
from opd_ray.rewards.geneval_detector import Detector
from opd_ray.rewards.geneval_rules import Found, Objects, Paint, Wanted, keep, official, partial, strict
from opd_ray.rewards.raster import LastBatch, Pixels, as_pixels

__all__ = ["GenEval", "GenEvalPartial", "GenEvalStrict"]

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP, CLIP_ARCHITECTURE = "timm/vit_large_patch14_clip_224.openai", "ViT-L-14-quickgelu"


class GenEval:
    """The official score: 1 where enough of everything is there, as asked, and nothing that is excluded; else 0.

    Args:
        detector: folder or hub id of a Mask2Former of COCO's 80 instance classes, as transformers saves it.
        detector_revision: its branch, tag or commit.
        clip: folder or hub id of OpenAI's ViT-L-14, with open_clip_model.safetensors.
        clip_revision: its branch, tag or commit.
        clip_architecture: open_clip's name for it.
        device: where both run.
    """

    def __init__(
        self,
        *,
        detector: str = DETECTOR,
        detector_revision: str | None = None,
        clip: str = CLIP,
        clip_revision: str | None = None,
        clip_architecture: str = CLIP_ARCHITECTURE,
        device: str = "cpu",
    ) -> None:
        self._observer = observer(detector, detector_revision, clip, clip_revision, clip_architecture, device)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; NaN for a prompt whose row has no `include`.

        Raises:
            PromptError: a row asks for something that the detector or the rules do not know.
        """
        wanted = [Wanted.of(row, prompt) for row, prompt in zip(metadata, prompts, strict=True)]
        scores = torch.full((len(prompts),), float("nan"))
        chosen = [(i, one) for i, one in enumerate(wanted) if one]
        for i, one in chosen:
            if unknown := one.names - self._observer.names:
                raise PromptError(
                    f"the GenEval columns of prompt {prompts[i]!r} ask for {sorted(unknown)[0]!r}, which the detector "
                    f"does not know; it knows {', '.join(sorted(self._observer.names))}"
                )
        if chosen:
            scenes = self._observer.look(as_pixels(images[[i for i, _ in chosen]]))
            for (i, one), scene in zip(chosen, scenes, strict=True):
                scores[i] = self.judge(one, keep(scene.objects, one), scene.paint)
        return scores

    @staticmethod
    def judge(wanted: Wanted, objects: Objects, paint: Paint) -> float:
        """By the official rules."""
        return official(wanted, objects, paint)


class GenEvalStrict(GenEval):
    """1 where exactly as many of everything are there, all of them as asked; else 0. Arguments as for `geneval`."""

    @staticmethod
    def judge(wanted: Wanted, objects: Objects, paint: Paint) -> float:
        """By the strict rules."""
        return strict(wanted, objects, paint)


class GenEvalPartial(GenEval):
    """The mean of how well counts, colours and positions are met, at most 1. Arguments as for `geneval`."""

    @staticmethod
    def judge(wanted: Wanted, objects: Objects, paint: Paint) -> float:
        """By parts."""
        return partial(wanted, objects, paint)


class Scene:
    """A picture's objects, and their colours as far as somebody asked."""

    def __init__(self, picture: Pixels, objects: Objects, colours: Colours) -> None:
        self.objects = objects
        self._picture, self._colours = picture, colours
        self._known: dict[Found, str] = {}

    def paint(self, name: str, objects: Sequence[Found]) -> list[str]:
        """The colour of each of its objects of a class."""
        new = [one for one in objects if one not in self._known]
        self._known.update(zip(new, self._colours(self._picture, name, new), strict=True))
        return [self._known[one] for one in objects]


class Observer:
    """The two models, and what they saw in the last batch."""

    def __init__(self, detector: Detector, colours: Colours) -> None:
        self.names = frozenset(detector.names)
        self.look = LastBatch(
            lambda pixels: [Scene(*seen, colours) for seen in zip(pixels, detector(pixels), strict=True)]
        )


@cache
def observer(
    detector: str,
    detector_revision: str | None,
    clip: str,
    clip_revision: str | None,
    clip_architecture: str,
    device: str,
) -> Observer:
    """One a process, however many rewards use it."""
    colours = Colours(clip, clip_revision, clip_architecture, device)
    return Observer(Detector(detector, detector_revision, device), colours)
