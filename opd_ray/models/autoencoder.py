"""Pictures to latents and back, by diffusers' AutoencoderKL, for the families that have one."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models.base import Family
from opd_ray.models.checkpoint import read_config

__all__ = ["KLAutoencoder", "vae_factor"]


class KLAutoencoder(Family):
    """A family whose latents are those of an AutoencoderKL, and whose text encoders are a pipeline's of diffusers."""

    def __init__(
        self,
        model: ModelConfig,
        network: Any,
        *,
        text: Any,
        vae: Any,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``vae`` is in float32; it and ``text`` are None where they were not loaded."""
        size = self.latent_size(model, network.config)
        shape = (network.config.in_channels, size, size)
        super().__init__(model, network, latent_shape=shape, device=device, dtype=dtype)
        self._text = text
        self._vae = vae

    @classmethod
    @abstractmethod
    def latent_size(cls, model: ModelConfig, network: Any) -> int:
        """Height and width of the latents, from the configs of the run and of the network.

        Raises:
            ModelError: the asked for resolution is none of the network's.
        """

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See ``Family.decode``."""
        vae = self._loaded_vae()
        raw = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images: Tensor = vae.decode(raw, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See ``Family.encode_images``; the mode of the posterior."""
        vae = self._loaded_vae()
        sides = tuple(side * _factor(vae.config) for side in self.latent_shape[1:])
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *sides):
            raise ValueError(f"pictures are {list(images.shape)}, expected [B, 3, {sides[0]}, {sides[1]}]")
        raw: Tensor = vae.encode(2 * images.float() - 1).latent_dist.mode()
        return (raw - (vae.config.shift_factor or 0.0)) * float(vae.config.scaling_factor)

    def _loaded_vae(self) -> Any:
        if self._vae is None:
            raise ModelError(f"model {self.model.path!r} was loaded without its VAE")
        return self._vae


def vae_factor(model: ModelConfig) -> int:
    """Pixels for a latent, in each direction, from the VAE's config alone."""
    return _factor(read_config(model, "vae/config.json"))


def _factor(config: Any) -> int:
    factor: int = 2 ** (len(config["block_out_channels"]) - 1)
    return factor
