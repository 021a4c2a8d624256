"""CLIPScore: how near a picture is to its prompt, for the CLIP that was trained on captions."""

from typing import ClassVar

import torch
from torch import Tensor

from opd_ray.rewards.clip import Clip
from opd_ray.rewards.probe_pictures import colours
from opd_ray.rewards.probes import Probe

__all__ = ["ClipScore"]


class ClipScore:
    """exp(logit_scale) cos(image, text) / 100, of OpenAI's ViT-L/14; its scale is 100, so that is the cosine.

    Good pictures have 0.2 to 0.35. Hessel et al., arXiv 2104.08718, whose own 2.5 max(cos, 0) is not applied: the
    reward as Flow-GRPO and DiffusionNFT report it.

    Args:
        model: hub id or folder of the CLIP.
        processor: hub id or folder of its tokenizer.
        revision: branch, tag or commit of ``model``.
        device: where it runs.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    what: ClassVar[str] = "CLIPScore"
    divide_by: float = 100.0

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        self.clip = Clip(self.what, model, revision, device, texts=processor)
        self.weights = self.clip.weights

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]."""
        return self.clip.logits(images, prompts) / self.divide_by

    def probes(self) -> list[Probe]:
        """A colour that was asked for, against another."""
        return colours()
