"""Random Stable Diffusion 1.5 and SDXL in miniature: the same parts, options and file layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.models.tiny_sd3 import clip_encoder, clip_tokenizer

WIDTH, SECOND, TIME = 16, 24, 8
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's own."""


def sd_scheduler(**changes: Any) -> DDIMScheduler:
    """SD 1.5's, as its file says it."""
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**{**BETAS, **options, **changes})


def turbo_scheduler(**changes: Any) -> EulerAncestralDiscreteScheduler:
    """SDXL-Turbo's."""
    return EulerAncestralDiscreteScheduler(**{**BETAS, "timestep_spacing": "trailing", "steps_offset": 1, **changes})


def _unet(text_width: int, sample: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )


def make_tiny_sd(folder: Path, *, seed: int = 0, scheduler: SchedulerMixin | None = None, **unet: Any) -> Path:
    """Save a StableDiffusionPipeline with random weights, and return its folder.

    Latents are 4 x 8 x 8 and images 3 x 16 x 16; the same seed makes the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        parts = {
            "unet": _unet(WIDTH, 8, **unet),
            "vae": _vae(),
            "text_encoder": clip_encoder(tokenizer, CLIPTextModel, WIDTH, 3),
            "tokenizer": tokenizer,
        }
    pipeline = StableDiffusionPipeline(
        **parts,
        scheduler=scheduler or sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tiny_sdxl(folder: Path, *, seed: int = 0, scheduler: SchedulerMixin | None = None, zeros: bool = True) -> Path:
    """Save a StableDiffusionXLPipeline likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        unet = _unet(
            WIDTH + SECOND,
            8,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME,
            projection_class_embeddings_input_dim=6 * TIME + SECOND,
            use_linear_projection=True,
        )
        parts = {
            "unet": unet,
            "vae": _vae(),
            "text_encoder": clip_encoder(tokenizer, CLIPTextModel, WIDTH, 3),
            "text_encoder_2": clip_encoder(tokenizer, CLIPTextModelWithProjection, SECOND, 3),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
        }
    pipeline = StableDiffusionXLPipeline(
        **parts,
        scheduler=scheduler or turbo_scheduler(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
