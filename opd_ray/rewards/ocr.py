"""Whether a picture shows the text that its prompt quotes.

The target is what stands between the prompt's first two ASCII double quotes. Target and recognised text are compared
without spaces and in lower case. A prompt without such a target (no quote, a single one as in `a 12" pizza`, nothing
between them) asks for no text: NaN.

Source: Flow-GRPO (arXiv 2505.05470, section 4.1), which reads with PaddleOCR 2.9.1; here RapidOCR's bundled PP-OCRv6
models read, so that nothing is downloaded. A failing reader raises; it is no score.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opd_ray.rewards.probes import Probe
from opd_ray.rewards.raster import Pixels, as_pixels, as_tensor
from opd_ray.rewards.text_reader import read, require_reader
from opd_ray.world.reading import edit_distance

__all__ = ["Ocr", "OcrExact"]


class Ocr:
    """1 - d / len(target), with d = 0 where the target is part of the recognised text. Range 0 to 1.

    Otherwise d = min(Levenshtein distance, len(target)). Text beside the target costs nothing; `ocr_exact` charges it.
    """

    def __init__(self) -> None:
        require_reader()

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; NaN for a prompt that quotes nothing."""
        targets = [target_of(prompt) for prompt in prompts]
        scores = torch.full((len(prompts),), float("nan"))
        chosen = [i for i, target in enumerate(targets) if target]
        if chosen:
            for i, lines in zip(chosen, self.read(as_pixels(images[chosen])), strict=True):
                scores[i] = self.score(plain("".join(lines)), targets[i])
        return scores

    @staticmethod
    def read(pixels: Pixels) -> list[list[str]]:
        """The lines of text in each picture [B, H, W, 3]."""
        return read(pixels)

    @staticmethod
    def score(recognised: str, target: str) -> float:
        """Of two plain texts."""
        if target in recognised:
            return 1.0
        return 1 - min(edit_distance(recognised, target), len(target)) / len(target)

    def probes(self) -> list[Probe]:
        """A printed word against another one, both ways."""
        first, second = "planet", "kitchen"
        return [_probe(first, second), _probe(second, first)]


class OcrExact(Ocr):
    """1 - Levenshtein distance / length of the longer text, so that text beside the target costs. Range 0 to 1."""

    @staticmethod
    def score(recognised: str, target: str) -> float:
        """Of two plain texts."""
        return 1 - edit_distance(recognised, target) / max(len(recognised), len(target))


def target_of(prompt: str) -> str:
    """The plain text between the first two ASCII double quotes; empty where there is none."""
    parts = prompt.split('"', 2)
    return plain(parts[1]) if len(parts) == 3 else ""


def plain(text: str) -> str:
    """Without spaces, in lower case."""
    return "".join(text.split()).lower()


def _probe(right: str, wrong: str) -> Probe:
    prompt = f'A sign that says "{right}"'
    return Probe((print_word(right), prompt), (print_word(wrong), prompt))


def print_word(word: str, size: int = 256) -> Tensor:
    """[3, size, size]: the word in black in the middle of a white picture, in Pillow's own font."""
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size * 1.5 / max(len(word), 4))
    ImageDraw.Draw(picture).text((size / 2, size / 2), word, font=font, fill="black", anchor="mm")
    return as_tensor(np.asarray(picture))
