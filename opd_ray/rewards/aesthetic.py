"""LAION's aesthetic predictor: how much people like a picture, whatever was asked for."""

import torch
from torch import Tensor

from opd_ray.models.published import fit, read_published
from opd_ray.rewards.clip import Clip
from opd_ray.rewards.head import Head
from opd_ray.rewards.probe_pictures import noise, smooth
from opd_ray.rewards.probes import Probe

__all__ = ["Aesthetic"]


class Aesthetic:
    """Head(image / |image|) of OpenAI's CLIP ViT-L/14: the "v2" predictor, sac+logos+ava1-l14-linearMSE.

    Meant as 1 to 10; photographs and drawings of diffusion models have 4 to 8, and above 7.5 a model has learned to
    please it. Prompts are ignored. Source: christophschuhmann/improved-aesthetic-predictor; DDPO, arXiv 2305.13301.

    Args:
        model: hub id or folder of the CLIP; its tower for pictures alone is loaded.
        head: file of the head, or a hub id or folder that has ``head_file``. The default is TRL's copy of LAION's
            sac+logos+ava1-l14-linearMSE.pth, which is on no hub itself.
        head_file: its name there.
        revision: branch, tag or commit of ``model``.
        head_revision: branch, tag or commit of ``head``.
        device: where it runs.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        head_file: str = "aesthetic-model.pth",
        revision: str | None = None,
        head_revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        published = read_published("aesthetic: head", head, head_file, head_revision)
        self.clip = Clip("aesthetic", model, revision, device, texts=None)
        self.head = Head(self.clip.width)
        fit(self.head, published.tensors, published.what)
        self.head.to(device).requires_grad_(False).eval()
        self.weights = {**self.clip.weights, f"{head}/{published.path.name}": published.sha256}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]."""
        score: Tensor = self.head(self.clip.pictures(images))
        return score.cpu()

    def probes(self) -> list[Probe]:
        """A sky against noise."""
        return [Probe((smooth(), "an evening sky"), (noise(), "an evening sky"))]
