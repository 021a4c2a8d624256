"""GenEval's detector: objects with boxes, masks and confidences.

Source: GenEval (arXiv 2310.11513; djghosh13/geneval, evaluation/evaluate_images.py). It detects with mmdet's
Mask2Former (Swin-S, COCO instances); here transformers' Mask2Former of the same shape and training set does, at the
same size of input and with mmdet's confidences (class probability times mean mask probability). Other weights find
other objects: say which detector a number is from.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.download import Source
from opd_ray.rewards.geneval_rules import THRESHOLD, Box, Found
from opd_ray.rewards.raster import Pixels

__all__ = ["Detector"]

CLASSES = 80
SHORT_SIDE, LONG_SIDE = 800, 1333
"""To which pictures are scaled, as by mmdet; the published processor's own 384 pixels miss small objects."""
MAX_DETECTIONS = 100
AT_ONCE = 8
"""Pictures in one forward: the masks of all queries and decoder layers take 160 MB each."""
SPELLINGS = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}
"""COCO's labels, of which there are two spellings, as GenEval calls them."""


class Detector:
    """Finds COCO's 80 classes.

    Args:
        place: a folder or hub id with config.json, preprocessor_config.json and model.safetensors.
        revision: of the hub repository.
        device: where it runs.

    Raises:
        ModelError: it cannot be read, or is no such detector.
    """

    def __init__(self, place: str, revision: str | None, device: str) -> None:
        from transformers import AutoImageProcessor

        from opd_ray.rewards.mask2former import Mask2Former

        what = f"GenEval's detector {place!r}"
        folder = Source(what, place, revision).fetch("config.json", "preprocessor_config.json", "model.safetensors")
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model, told = Mask2Former.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"{what} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        if absent := sorted(told["missing_keys"]):
            raise ModelError(f"{what} lacks {len(absent)} of its weights, {absent[0]} first; is it a Mask2Former?")
        labels = model.config.id2label
        if len(labels) != CLASSES:
            raise ModelError(
                f"{what} knows {len(labels)} classes; GenEval needs one trained on COCO's {CLASSES} instances"
            )
        self.names = [SPELLINGS.get(labels[i], labels[i]) for i in range(CLASSES)]
        self._model = model.eval().to(device)

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> list[dict[str, list[Found]]]:
        """Class -> objects that may count, for each picture [B, H, W, 3]."""
        return [seen for start in range(0, len(pixels), AT_ONCE) for seen in self._see(pixels[start : start + AT_ONCE])]

    def _see(self, pixels: Pixels) -> list[dict[str, list[Found]]]:
        size = {"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE}
        given = self._processor(images=list(pixels), size=size, return_tensors="pt").to(self._model.device)
        logits, masks = self._model(**given)
        height, width = pixels.shape[1:3]
        pairs = zip(logits.float(), masks.float(), strict=True)
        return [found_in(*pair, self.names, (height, width)) for pair in pairs]


def found_in(logits: Tensor, masks: Tensor, names: Sequence[str], size: tuple[int, int]) -> dict[str, list[Found]]:
    """Objects by class from the queries of one picture.

    The confidence is the class's probability times the mean probability of the pixels in the mask.

    Args:
        logits: [Q, classes + 1], the last one for "nothing".
        masks: [Q, h, w] logits of each pixel.
        names: of the classes.
        size: height and width of the picture.

    Raises:
        ArithmeticError: they are not finite, which would read as an empty picture.
    """
    if not (bool(logits.isfinite().all()) and bool(masks.isfinite().all())):
        raise ArithmeticError("the detector answers with NaN or infinity: its weights or its precision are broken")
    chances = logits.softmax(-1)[:, :-1]
    best, places = chances.flatten().topk(min(MAX_DETECTIONS, chances.numel()))
    best, places = best[best > THRESHOLD], places[best > THRESHOLD]  # a mask only lowers it
    found: dict[str, list[Found]] = {}
    for chance, place in zip(best.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, chances.shape[1])
        levels = F.interpolate(masks[query][None, None], size, mode="bilinear", align_corners=False)[0, 0]
        mask = levels > 0
        if mask.any():
            confidence = chance * float(levels.sigmoid()[mask].mean())
            found.setdefault(names[label], []).append(Found(_around(mask), confidence, mask.cpu().numpy()))
    return found


def _around(mask: Tensor) -> Box:
    """Left, top, right and bottom of what is in the mask; right and bottom are the first pixels outside."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
