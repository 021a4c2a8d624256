"""GenEval's colour classifier: what colour an object has.

Source: GenEval (arXiv 2310.11513; djghosh13/geneval, evaluation/evaluate_images.py): open_clip's ViT-L-14 with OpenAI's
weights, zero-shot over ten colours, on the object's box with everything outside of its mask in one grey.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.download import Source
from opd_ray.rewards.geneval_rules import COLOURS, Found
from opd_ray.rewards.raster import Pixels

__all__ = ["Colours"]

GREY = "#999999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
WEIGHTS = "open_clip_model.safetensors"


class Colours:
    """Names the colours of objects: zero-shot, ten colours, three sentences each.

    Args:
        place: a folder or hub id with open_clip_model.safetensors.
        revision: of the hub repository.
        architecture: open_clip's name. OpenAI's weights are for QuickGELU; `ViT-L-14` alone has another activation, and
            takes them without a word.
        device: where it runs.

    Raises:
        ModelError: it cannot be read.
    """

    def __init__(self, place: str, revision: str | None, architecture: str, device: str) -> None:
        import open_clip

        what = f"GenEval's colour classifier {place!r}"
        file = Source(what, place, revision).fetch(WEIGHTS) / WEIGHTS
        if not file.is_file():
            raise ModelError(f"{what}: there is no {WEIGHTS}")
        if architecture not in open_clip.list_models():
            raise ModelError(f"{what}: open_clip has no architecture {architecture!r}; GenEval's is ViT-L-14-quickgelu")
        try:
            made = open_clip.create_model_and_transforms(architecture, pretrained=str(file), device=device)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ModelError(f"{what} cannot be loaded as {architecture}: {reason}") from error
        model, _, self._transform = made
        self._tokenizer = open_clip.get_tokenizer(architecture)
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
        if not bool(looks.isfinite().all()):
            raise ArithmeticError("the colour classifier answers with NaN: its weights or its precision are broken")
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
