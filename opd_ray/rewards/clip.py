"""A CLIP of transformers, from a hub id or a folder: pictures and texts to points on one sphere."""

import logging
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import load_folder, refusing, weight_files
from opd_ray.models.download import Source
from opd_ray.models.published import hashed
from opd_ray.rewards.pixels import cropped
from opd_ray.rewards.tokens import load_tokenizer

__all__ = ["Clip"]

TOKENS = 77
"""How long a text may be, for every CLIP there is; what is longer is cut off."""

CHATTY = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
"""They tell of the tower that is left away, and of layers that are not spread over devices."""


class Clip:
    """Both towers, or that for pictures alone, frozen, in float32.

    Args:
        what: for messages: whose model it is.
        model: hub id or folder of a ``CLIPModel`` in safetensors.
        revision: branch, tag or commit of ``model``.
        device: where it goes.
        texts: hub id or folder with the tokenizer; None leaves the tower for texts away.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    def __init__(self, what: str, model: str, revision: str | None, device: str, texts: str | None) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

        for chatty in CHATTY:
            logging.getLogger(chatty).setLevel(logging.ERROR)
        what_model = f"{what}: model {model!r}"
        folder = Source(what_model, model, revision).fetch("*.json", "*.safetensors")
        with refusing(f"{what_model} has no configuration of a CLIP"):
            config: Any = CLIPConfig.from_pretrained(folder)
        words: int = config.text_config.vocab_size
        self.size: int = config.vision_config.image_size
        self.width: int = config.projection_dim
        kind = CLIPModel
        if texts is None:
            kind, config = CLIPVisionModelWithProjection, config.vision_config
            config.projection_dim = self.width  # the vision part's own may be a default that nothing reads
        self.network: Any = load_folder(what_model, kind, folder, device, config=config, ignore_mismatched_sizes=True)
        self.weights = {f"{model}/{file.name}": hashed(file) for file in weight_files(folder)}
        self.device = device
        self._tokenizer: Any = None
        if texts is not None:
            self._tokenizer = load_tokenizer(f"{what}: processor", CLIPTokenizer, texts)
            if len(self._tokenizer) != words:
                raise ModelError(
                    f"{what}: processor {texts!r} knows {len(self._tokenizer)} tokens and model {model!r} {words}: "
                    "one is not made for the other"
                )

    def pictures(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to [B, D] of length 1."""
        pixels = cropped(images.to(self.device), self.size)
        if self._tokenizer is None:
            found = self.network(pixel_values=pixels).image_embeds
        else:
            found = self.network.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(found, dim=-1)

    def texts(self, prompts: list[str]) -> Tensor:
        """B texts to [B, D] of length 1."""
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        return F.normalize(self.network.get_text_features(**tokens).pooler_output, dim=-1)

    def logits(self, images: Tensor, prompts: list[str]) -> Tensor:
        """exp(logit_scale) cos(image, text), [B] on the CPU: each picture with its own prompt alone."""
        cosines = (self.pictures(images) * self.texts(prompts)).sum(-1)
        answer: Tensor = (self.network.logit_scale.exp() * cosines).cpu()
        return answer
