"""What GenEval's two models see: objects with boxes and masks, and the colours of objects.

Source: GenEval (arXiv 2310.11513; djghosh13/geneval, evaluation/evaluate_images.py). It detects with mmdet's
Mask2Former (Swin-S, COCO instances); here transformers' Mask2Former of the same shape and training set does, at the
same size of input and with mmdet's confidences (class probability times mean mask probability). Other weights find
other objects: say which detector a number is from. Colours come from open_clip's ViT-L-14 of OpenAI, as there.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.download import Source
from opd_ray.rewards.geneval_rules import COLOURS, THRESHOLD, Box, Found
from opd_ray.rewards.pixels import Pixels

__all__ = ["Colours", "Detector"]

CLASSES = 80
SHORT_SIDE, LONG_SIDE = 800, 1333
"""To which pictures are scaled, as by mmdet; the published processor's own 384 pixels miss small objects."""
MAX_DETECTIONS = 100
GREY = "#999999"
"""Around an object whose colour is asked."""
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
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
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        what = f"GenEval's detector {place!r}"
        folder = Source(what, place, revision).fetch("config.json", "preprocessor_config.json", "model.safetensors")
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model, told = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{what} cannot be loaded: {_one_line(error)}") from error
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
        size = {"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE}
        given = self._processor(images=list(pixels), size=size, return_tensors="pt").to(self._model.device)
        seen = self._model(**given)
        height, width = pixels.shape[1:3]
        pairs = zip(seen.class_queries_logits.float(), seen.masks_queries_logits.float(), strict=True)
        return [found_in(logits, masks, self.names, (height, width)) for logits, masks in pairs]


def found_in(logits: Tensor, masks: Tensor, names: Sequence[str], size: tuple[int, int]) -> dict[str, list[Found]]:
    """Objects by class from the queries of one picture.

    The confidence is the class's probability times the mean probability of the pixels in the mask.

    Args:
        logits: [Q, classes + 1], the last one for "nothing".
        masks: [Q, h, w] logits of each pixel.
        names: of the classes.
        size: height and width of the picture.
    """
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


class Colours:
    """Names the colours of objects: zero-shot, ten colours, three sentences each.

    Args:
        place: a folder or hub id with open_clip_config.json and open_clip_model.safetensors. The config's `quick_gelu`
            has to be true for OpenAI's weights; open_clip's own name `ViT-L-14` would build them without.
        revision: of the hub repository.
        device: where it runs.

    Raises:
        ModelError: it cannot be read.
    """

    def __init__(self, place: str, revision: str | None, device: str) -> None:
        import open_clip

        what = f"GenEval's colour classifier {place!r}"
        folder = Source(what, place, revision).fetch("open_clip_config.json", "open_clip_model.safetensors")
        for name in ("open_clip_config.json", "open_clip_model.safetensors"):
            if not (folder / name).is_file():  # open_clip goes on without weights
                raise ModelError(f"{what}: there is no {name}")
        try:
            model, _, self._transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
            self._tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{what} cannot be loaded: {_one_line(error)}") from error
        self._model = model.eval()
        self._device = device
        self._sentences: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture: Pixels, name: str, objects: Sequence[Found]) -> list[str]:
        """The colour of each object of a class in a picture [H, W, 3]."""
        if not objects:
            return []
        crops = torch.stack([self._transform(crop(picture, one)) for one in objects])
        looks = F.normalize(self._model.encode_image(crops.to(self._device)), dim=-1)
        return [COLOURS[i] for i in (looks @ self._sentences_of(name).T).argmax(1).tolist()]

    def _sentences_of(self, name: str) -> Tensor:
        """[10, width]: for each colour the mean direction of its sentences."""
        if name not in self._sentences:
            said = [form.format(colour=colour, name=name) for colour in COLOURS for form in TEMPLATES]
            words = F.normalize(self._model.encode_text(self._tokenizer(said).to(self._device)), dim=-1)
            self._sentences[name] = F.normalize(words.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)
        return self._sentences[name]


def crop(picture: Pixels, one: Found) -> Image.Image:
    """The object's box, grey outside of its mask."""
    image = Image.fromarray(picture)
    if one.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(one.mask))
    return image.crop(cast(tuple[int, int, int, int], tuple(round(side) for side in one.box)))


def _around(mask: Tensor) -> Box:
    """Left, top, right and bottom of what is in the mask; right and bottom are the first pixels outside."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
