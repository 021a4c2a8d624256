"""PickScore: what people picked of two pictures of their own prompt."""

from typing import ClassVar

from opd_ray.rewards.clipscore import ClipScore

__all__ = ["PickScore"]


class PickScore(ClipScore):
    """exp(logit_scale) cos(image, text) / ``divide_by``, of a CLIP ViT-H/14 tuned on Pick-a-Pic.

    Raw it is 18 to 26. ``divide_by: 26`` is what Flow-GRPO and DiffusionNFT train on (0.8 to 0.95).
    Kirstain et al., "Pick-a-Pic", arXiv 2305.01569, section 4.

    Args:
        model: hub id or folder of the CLIP.
        processor: hub id or folder of its tokenizer.
        revision: branch, tag or commit of ``model``.
        divide_by: 1 for the score as it is published.
        device: where it runs.

    Raises:
        ModelError: files that are missing, cut short, or of another architecture.
    """

    what: ClassVar[str] = "PickScore"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        divide_by: float = 1.0,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, processor, revision, device)
        self.divide_by = divide_by
