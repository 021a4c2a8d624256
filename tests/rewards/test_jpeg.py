"""JPEG sizes as rewards, against an independent encoding."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from opd_ray.errors import ConfigError
from opd_ray.rewards import make_rewards
from opd_ray.rewards.jpeg import JpegCompressibility, JpegIncompressibility


def test_sizes_are_those_of_saved_files(tmp_path) -> None:
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    kilobytes = []
    for i, image in enumerate(images):
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", quality=95)
        kilobytes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    prompts = [""] * 3
    made = make_rewards({"jpeg_incompressibility": {}, "jpeg_compressibility": {"scale": 1 / 500}})
    assert made["jpeg_incompressibility"](images, prompts).tolist() == pytest.approx(kilobytes)
    assert made["jpeg_compressibility"](images, prompts).tolist() == pytest.approx([-k / 500 for k in kilobytes])


def test_the_whole_file_is_counted_and_pixels_are_rounded_and_clamped() -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8), (128, 0, 255)).save(file, format="JPEG", quality=95)
    image = torch.tensor([127.5001 / 255, -0.2, 1.3]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert JpegIncompressibility()(image, [""]).item() == pytest.approx(len(file.getvalue()) / 1000)


@pytest.mark.parametrize("reward", [JpegCompressibility, JpegIncompressibility])
def test_probes_rank(reward) -> None:
    (probe,) = reward().probes()
    better, worse = reward()(torch.stack([probe.better[0], probe.worse[0]]), ["", ""]).tolist()
    assert better > worse
    assert (better > 0) == (reward is JpegIncompressibility)


@pytest.mark.parametrize("scale", [0, -1, float("nan")])
def test_a_scale_that_turns_the_direction_is_refused(scale) -> None:
    with pytest.raises(ConfigError, match="give a number above 0"):
        JpegCompressibility(scale=scale)
