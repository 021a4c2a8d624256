"""transformers' Mask2Former for inference: its own class builds a loss, which needs SciPy."""

from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

__all__ = ["Mask2Former"]


class Mask2Former(Mask2FormerPreTrainedModel):  # type: ignore[misc]  # transformers is Any
    """`Mask2FormerForUniversalSegmentation` without its loss; reads and writes the same files."""

    _keys_to_ignore_on_load_unexpected = (r"^criterion\.", r"relative_position_index$")
    _keys_to_ignore_on_load_missing = (r"encoder\.swin\.layernorm\.",)  # never used, and in no older file

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each query's logits: [B, Q, classes + 1], the last for "nothing", and of the mask's pixels [B, Q, h, w]."""
        seen = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
        queries = seen.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), seen.masks_queries_logits[-1]
