"""ImageReward: what annotators preferred, for a network that reads the prompt while it views the picture."""

import torch
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.published import fit, read_published
from opd_ray.rewards.blip import Blip, renamed
from opd_ray.rewards.pixels import cropped
from opd_ray.rewards.probe_pictures import colours
from opd_ray.rewards.probes import Probe
from opd_ray.rewards.tokens import load_tokenizer

__all__ = ["ImageReward"]

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Version 1.0's, which its code subtracts and divides by; the file has neither."""
TOKENS = 35
"""What is longer is cut off, as in its training."""
ADDED = ("[DEC]", "[ENC]")
"""BLIP's own words beside BERT's, which no prompt has and no score reads."""
UNUSED = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "reader.embeddings.position_ids",
)
"""In the published file and in no score: BLIP's contrastive projections, and numbers from 0 to 511."""


class ImageReward:
    """(Head(CLS) - 0.1672) / 1.0333, CLS the first token of BLIP's BERT with cross-attention to its ViT-L/16 at 224.

    About -2.3 to 2. Xu et al., arXiv 2304.05977; version 1.0. Each picture is scored with its own prompt alone.
    The ``image-reward`` package itself does not run with transformers 5.

    Args:
        model: file of the weights, or a hub id or folder that has ``file``.
        file: its name there.
        tokenizer: hub id or folder of BERT's.
        revision: branch, tag or commit of ``model``.
        device: where it runs.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        from transformers import BertTokenizer

        published = read_published("ImageReward: model", model, file, revision)
        tensors = {renamed(name): tensor for name, tensor in published.tensors.items()}
        self.network = Blip(tensors, published.what)
        fit(self.network, tensors, published.what, UNUSED)
        self.network.to(device).requires_grad_(False).eval()
        self._tokenizer = load_tokenizer("ImageReward: tokenizer", BertTokenizer, tokenizer)
        more = self.network.words - len(self._tokenizer)
        if not 0 <= more <= len(ADDED):
            raise ModelError(
                f"ImageReward: tokenizer {tokenizer!r} knows {len(self._tokenizer)} tokens, and {published.what} "
                f"{self.network.words}, which may be {', '.join(ADDED)} more and nothing else"
            )
        self.device = device
        self.weights = {f"{model}/{published.path.name}": published.sha256}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]."""
        text = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        pixels = cropped(images.to(self.device), self.network.size)
        raw = self.network(pixels, text.input_ids.to(self.device), text.attention_mask.to(self.device))
        score: Tensor = (raw - MEAN) / STD
        return score.cpu()

    def probes(self) -> list[Probe]:
        """A colour that was asked for, against another."""
        return colours()
