"""Human Preference Score v2 and v2.1, on open_clip itself: its own package pins old releases of much else."""

from typing import Any

import torch
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.published import fit, read_published
from opd_ray.rewards.pixels import padded
from opd_ray.rewards.probe_pictures import colours
from opd_ray.rewards.probes import Probe

__all__ = ["HPSv2", "HPSv21"]


class HPSv2:
    """cos(image, text) without a scale, of an open_clip ViT-H/14 tuned on HPD v2.

    v2 gives about 0.25 to 0.29 and v2.1 0.14 to 0.34: numbers of the two are not to be compared. Both run in float32;
    the published script's autocast differs in the third digit. Wu et al., arXiv 2306.09341; v2.1 is in its repository.

    Args:
        model: file of the weights, or a hub id or folder that has ``file``.
        file: its name there; the weights are under ``state_dict`` in it.
        architecture: open_clip's name of the network.
        revision: branch, tag or commit of ``model``.
        device: where it runs.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        file: str = "HPS_v2_compressed.pt",
        architecture: str = "ViT-H-14",
        revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        import open_clip

        config = open_clip.get_model_config(architecture)
        if config is None:
            raise ModelError(
                f"HPSv2: open_clip has no architecture {architecture!r}; the published weights are ViT-H-14"
            )
        published = read_published("HPSv2: model", model, file, revision)
        self.network: Any = open_clip.CLIP(**config)  # create_model would speak to the root logger
        fit(self.network, published.tensors, published.what)
        self.network.to(device).requires_grad_(False).eval()
        self._tokenize = open_clip.SimpleTokenizer(context_length=self.network.context_length)
        self.size: int = config["vision_cfg"]["image_size"]
        self.device = device
        self.weights = {f"{model}/{published.path.name}": published.sha256}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]."""
        pictures = self.network.encode_image(padded(images.to(self.device), self.size), normalize=True)
        texts = self.network.encode_text(self._tokenize(prompts).to(self.device), normalize=True)
        cosines: Tensor = (pictures * texts).sum(-1)
        return cosines.cpu()

    def probes(self) -> list[Probe]:
        """A colour that was asked for, against another."""
        return colours()


class HPSv21(HPSv2):
    """The same network with the weights of v2.1."""

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        file: str = "HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, file, architecture, revision, device)
