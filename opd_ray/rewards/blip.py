"""BLIP with a head, as ImageReward is built, of transformers' building blocks; and its published names of tensors."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor, nn

from opd_ray.errors import ModelError
from opd_ray.rewards.head import Head

__all__ = ["Blip", "renamed"]

HEAD_WIDTH = 64
"""Numbers of an attention head, in every ViT and BERT that BLIP is made of."""
RENAMED = (
    (r"^blip\.text_encoder\.", "reader."),
    (r"^blip\.visual_encoder\.cls_token$", "viewer.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "viewer.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "viewer.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "viewer.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm", r"viewer.encoder.layers.\1.layer_norm"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"viewer.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"viewer.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"viewer.encoder.layers.\1.mlp."),
)
"""From salesforce/BLIP's names (timm's ViT, and med.py's BERT) to those of transformers."""


def renamed(name: str) -> str:
    """A tensor's name in a published file, as this module's."""
    for pattern, ours in RENAMED:
        name, found = re.subn(pattern, ours, name)
        if found:
            break
    return name


class Blip(nn.Module):
    """A ViT views the picture, a BERT reads the text with cross-attention to it in every layer, a head gives a number.

    Its sizes are those of the weights that it is made for.

    Args:
        tensors: by this module's names; for their shapes alone.
        what: for messages: whose weights they are.

    Raises:
        ModelError: a tensor that tells a size is missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()

        def shape(name: str) -> tuple[int, ...]:
            if name not in tensors:
                raise ModelError(f"{what} has no {name}: these are no weights of ImageReward")
            return tuple(tensors[name].shape)

        _, positions, width = shape("viewer.embeddings.position_embedding")
        patch = shape("viewer.embeddings.patch_embedding.weight")[-1]
        self.size = patch * isqrt(positions - 1)
        self.viewer: Any = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=shape("viewer.encoder.layers.0.mlp.fc1.weight")[0],
                num_hidden_layers=_count(r"viewer\.encoder\.layers\.(\d+)\.", tensors),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=self.size,
                patch_size=patch,
                layer_norm_eps=1e-6,  # timm's, not transformers' 1e-5
            )
        )
        self.words, read = shape("reader.embeddings.word_embeddings.weight")
        self.reader: Any = BlipTextModel(
            BlipTextConfig(
                vocab_size=self.words,
                hidden_size=read,
                encoder_hidden_size=width,
                intermediate_size=shape("reader.encoder.layer.0.intermediate.dense.weight")[0],
                num_hidden_layers=_count(r"reader\.encoder\.layer\.(\d+)\.", tensors),
                num_attention_heads=read // HEAD_WIDTH,
                max_position_embeddings=shape("reader.embeddings.position_embeddings.weight")[0],
                is_decoder=True,  # it has cross-attention; the mask below is not causal
            ),
            add_pooling_layer=False,
        )
        self.mlp = Head(read)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pixels [B, 3, size, size], tokens and mask [B, L] to [B]: the head's answer to the first token's state."""
        seen = self.viewer(pixel_values=pixels).last_hidden_state
        read = self.reader(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        score: Tensor = self.mlp(read.last_hidden_state[:, 0])
        return score


def _count(pattern: str, tensors: Mapping[str, Tensor]) -> int:
    """How many layers there are."""
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)
