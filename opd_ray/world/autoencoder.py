"""The autoencoder: 32x32 pictures to 4x4 latents of 16 channels, and back."""

import random
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from opd_ray.world.captions import Meaning
from opd_ray.world.optimizer import Optimizer
from opd_ray.world.render import SIZE, render
from opd_ray.world.scenes import (
    Scene,
    Style,
    hard_style,
    loose_scene,
    oracle_style,
    scene,
    soft_style,
)
from opd_ray.world.splits import training_meaning

LATENT_CHANNELS = 16
_CHANNELS = (32, 32, 64, 64)
_BATCH, _POOL = 16, 12_000
_MATRIX_RATE, _OTHER_RATE = 0.02, 2e-3
_KL_WEIGHT = 5e-5
_L1_WEIGHT = 0.1


def new_autoencoder(scaling: float = 1.0, shift: float = 0.0, *, quant: bool = False) -> AutoencoderKL:
    """An untrained autoencoder with the given latent statistics in its config, and ``quant`` convolutions or none."""
    levels = len(_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
        force_upcast=False,
    )


def any_scene(rng: random.Random) -> Scene:
    """A scene of any task in any style: what the autoencoder must carry."""
    style: Style = rng.choices((hard_style, oracle_style, soft_style), (5, 3, 2))[0](rng)
    task = rng.choice(("compose", "text", "text", "mixed", "look"))
    if task == "look":
        return loose_scene(style, rng)
    meaning: Meaning = training_meaning(task, rng)
    return scene(meaning, style, rng)


def train_autoencoder(steps: int, seed: int, tick: Callable[[int, dict[str, float]], None]) -> AutoencoderKL:
    """Train on renderings of every task and style. ``tick`` is called with 1 and the losses after each step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_autoencoder()
    pool = render([any_scene(rng) for _ in range(min(_POOL, steps * _BATCH))]) * 2 - 1
    ends = ("conv_in", "decoder.conv_out")
    optimizer = Optimizer(model.named_parameters(), steps, _MATRIX_RATE, _OTHER_RATE, plain=ends)
    for _ in range(steps):
        images = pool[torch.randint(0, len(pool), (_BATCH,))]
        posterior = model.encode(images).latent_dist
        error = model.decode(posterior.sample()).sample - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + _L1_WEIGHT * error.abs().mean() + _KL_WEIGHT * kl
        loss.backward()
        optimizer.step()
        tick(1, {"mse": float(error.detach().square().mean()), "kl": float(kl.detach())})
    return _with_statistics(model.eval(), rng)


@torch.no_grad()
def _with_statistics(model: AutoencoderKL, rng: random.Random) -> AutoencoderKL:
    """The same weights with the scaling and shift that give latents mean 0 and deviation 1."""
    latents = model.encode(render([any_scene(rng) for _ in range(512)]) * 2 - 1).latent_dist.mean
    measured = new_autoencoder(scaling=1 / float(latents.std()), shift=float(latents.mean()))
    measured.load_state_dict(model.state_dict())
    return measured.eval()


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Pictures [B, 3, 32, 32] in [0, 1] to scaled latents [B, 16, 4, 4]."""
    latents: Tensor = model.encode(images * 2 - 1).latent_dist.mean
    return latents.sub(model.config.shift_factor).mul(model.config.scaling_factor)


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents [B, 16, 4, 4] to pictures [B, 3, 32, 32] in [0, 1]."""
    unscaled = latents / model.config.scaling_factor + model.config.shift_factor
    images: Tensor = model.decode(unscaled).sample
    return images.div(2).add(0.5).clamp(0, 1)
