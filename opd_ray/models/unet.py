"""Stable Diffusion 1.5, 2 and Turbo, and Stable Diffusion XL, its Turbo and other U-Nets of its shape (DMD2).

Their networks know variance-preserving states; the change of coordinates to the flow path, and back, is in
``opd_ray.models.alphas``. Here it is one line each, in ``predict``.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models.alphas import AlphaSchedule, read_alpha_schedule
from opd_ray.models.autoencoder import KLAutoencoder, vae_factor
from opd_ray.models.base import Shape, count_numbers
from opd_ray.models.checkpoint import fetch_part, load_component, read_config, refusing
from opd_ray.types import Conditioning

__all__ = ["SD", "SDXL", "UNet"]

CLIP_TOKENS = 77
NUM_TIME_IDS = 6
# Inputs of a network beside state, timestep and text, which nobody here gives.
OTHER_INPUTS = {
    "class_embed_type": "a class",
    "encoder_hid_dim_type": "an image prompt",
    "time_cond_proj_dim": "guidance, as a distilled LCM does; its LoRA over the base (LCM-LoRA) needs none",
}


class UNet(KLAutoencoder):
    """A UNet2DConditionModel that predicts noise (epsilon) or v, with CLIP text encoders."""

    denoiser_part: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = tuple(
        f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
    pipelines: ClassVar[tuple[str, ...]]
    """Of model_index.json: the classes of its checkpoints."""
    extra_embedding: ClassVar[str | None]
    """The network's addition_embed_type."""
    text_suffixes: ClassVar[tuple[str, ...]]
    """Of its text encoders."""
    schedule: AlphaSchedule

    @cached_property
    def _factor(self) -> int:
        """Read once, not with every forward."""
        return vae_factor(self.model)

    @classmethod
    def latent_size(cls, model: ModelConfig, network: Any) -> int:
        """See ``KLAutoencoder.latent_size``.

        Raises:
            ModelError: the network says no size and none is asked for, or what is asked for cannot be halved at each
                level.
        """
        factor = vae_factor(model)
        unit = factor * 2 ** (len(network.block_out_channels) - 1)
        own = network.sample_size
        if model.resolution is None:
            if not isinstance(own, int):
                raise ModelError(
                    f"model {model.path!r} has sample_size {own} in its unet's config; give model.resolution"
                )
            return own
        if model.resolution % unit:
            raise ModelError(
                f"model.resolution {model.resolution} does not fit {model.path!r}: expected a multiple of {unit}, for "
                f"instance {max(round(model.resolution / unit), 1) * unit}"
            )
        return model.resolution // factor

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        *,
        text: bool,
        image: bool,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """See ``Family.load``."""
        cls._network_config(model)
        from diffusers import AutoencoderKL, UNet2DConditionModel

        network = load_component(UNet2DConditionModel, model, "unet", device, dtype)
        vae = load_component(AutoencoderKL, model, "vae", device) if image else None
        encoders = cls._text_pipeline(model, network, device, dtype) if text else None
        return cls(model, network, text=encoders, vae=vae, device=device, dtype=dtype)

    @classmethod
    def skeleton(cls, model: ModelConfig) -> nn.Module:
        """See ``Family.skeleton``."""
        from diffusers import UNet2DConditionModel

        config = cls._network_config(model)
        with refusing(f"model {model.path!r}: its unet"), torch.device("meta"):
            network: nn.Module = UNet2DConditionModel.from_config(config)
        return network

    @classmethod
    def read_schedule(cls, model: ModelConfig) -> AlphaSchedule:
        """See ``Family.read_schedule``."""
        return read_alpha_schedule(model)

    @classmethod
    def shape(cls, model: ModelConfig) -> Shape:
        """See ``Family.shape``. Its layers are counted as so many blocks of the first level's size."""
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig

        network: Any = cls.skeleton(model)
        own, factor = network.config, vae_factor(model)
        size, width = cls.latent_size(model, own), own.block_out_channels[0]
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read_config(model, "vae/config.json"))
            text = [
                cls._text_kind(suffix)(CLIPTextConfig(**read_config(model, f"text_encoder{suffix}/config.json")))
                for suffix in cls.text_suffixes
            ]
        # A level has a quarter of the tokens of the one before; per_level blocks go down, one more goes up.
        per_level = own.layers_per_block if isinstance(own.layers_per_block, int) else max(own.layers_per_block)
        depth = sum(
            (2 * per_level + 1) * other / width / 4**level for level, other in enumerate(own.block_out_channels)
        )
        return Shape(
            parameters={
                "denoiser": count_numbers(network),
                "text": sum(map(count_numbers, text)),
                "vae": count_numbers(vae),
            },
            layers=max(round(depth), 1),
            width=width,
            tokens=size**2,
            pixels=size * factor,
            latent=own.in_channels * size**2,
            conditioning=CLIP_TOKENS * own.cross_attention_dim + _pooled_width(own),
        )

    @abstractmethod
    def _more(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """What the network takes in ``added_cond_kwargs``."""

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See ``Family.predict``."""
        answer: Tensor = self.denoiser(
            sample=self.schedule.network_input(x, t),
            timestep=self.clock(t),
            encoder_hidden_states=cond["encoder_hidden_states"],
            added_cond_kwargs=self._more(x, cond),
            return_dict=False,
        )[0]
        return self.schedule.velocity(answer.float(), x, t)

    def random_conditioning(self, generator: torch.Generator) -> Conditioning:
        """See ``Family.random_conditioning``."""
        config = self.network.config
        return {"encoder_hidden_states": torch.randn(1, 4, config.cross_attention_dim, generator=generator)}

    @classmethod
    def fingerprint(cls, model: ModelConfig) -> dict[str, object]:
        """See ``Family.fingerprint``."""
        cls._index(model)
        vae = read_config(model, "vae/config.json")
        return {
            "latent channels": vae.get("latent_channels"),
            "pixels a latent": vae_factor(model),
            "VAE scaling factor": vae.get("scaling_factor", 0.18215),  # AutoencoderKL's default, which SD 1.5 relies on
            "VAE shift factor": vae.get("shift_factor"),
            **cls.read_schedule(model).facts(),
        }

    @classmethod
    def _index(cls, model: ModelConfig) -> dict[str, Any]:
        index = read_config(model, "model_index.json")
        if index.get("_class_name") not in cls.pipelines:
            raise ModelError(
                f"model {model.path!r} is a {index.get('_class_name')}; family {cls.__name__.lower()!r} loads "
                f"{', '.join(cls.pipelines)}"
            )
        return index

    @classmethod
    def _network_config(cls, model: ModelConfig) -> dict[str, Any]:
        """The U-Net's, of a network that takes what this family gives."""
        cls._index(model)
        config = read_config(model, "unet/config.json")
        what = f"model {model.path!r}: its unet"
        for name, asked in OTHER_INPUTS.items():
            if config.get(name) is not None:
                raise ModelError(f"{what} also takes {asked} ({name}), which is not served")
        if config.get("addition_embed_type") != cls.extra_embedding:
            raise ModelError(
                f"{what} has addition_embed_type {config.get('addition_embed_type')}; family {cls.__name__.lower()!r} "
                f"knows {cls.extra_embedding}"
            )
        channels = read_config(model, "vae/config.json").get("latent_channels", 4)
        if config.get("in_channels", 4) != channels:
            raise ModelError(
                f"{what} has {config.get('in_channels')} input channels and the VAE's latents {channels}: it also "
                "takes a picture (inpainting, editing), which is not served"
            )
        return config

    @classmethod
    def _text_pipeline(cls, model: ModelConfig, network: nn.Module, device: str, dtype: torch.dtype) -> Any:
        """The stock pipeline with nothing but what ``encode_prompt`` reads."""
        from transformers import CLIPTokenizer

        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # see SD3's
        parts: dict[str, Any] = {}
        for suffix in cls.text_suffixes:
            encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
            parts[encoder] = load_component(cls._text_kind(suffix), model, encoder, device, dtype)
            with refusing(f"model {model.path!r}: its {tokenizer} cannot be loaded"):
                parts[tokenizer] = CLIPTokenizer.from_pretrained(fetch_part(model, tokenizer))
        return cls._stock(cls._index(model), unet=network, scheduler=None, vae=None, **parts)

    @staticmethod
    def _text_kind(suffix: str) -> Any:
        """The class of a text encoder."""
        from transformers import CLIPTextModel

        return CLIPTextModel

    @staticmethod
    @abstractmethod
    def _stock(index: Mapping[str, Any], **parts: Any) -> Any:
        """The stock pipeline of these parts."""

    def _encoders(self) -> Any:
        if self._text is None:
            raise ModelError(f"model {self.model.path!r} was loaded without its text encoders")
        return self._text


class SD(UNet):
    """StableDiffusionPipeline's checkpoints: Stable Diffusion 1.x, 2.x, Turbo."""

    pipelines = ("StableDiffusionPipeline",)
    extra_embedding = None
    text_suffixes = ("",)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts as the stock pipeline encodes them: encoder_hidden_states [B, 77, D] float32."""
        states, _ = self._encoders().encode_prompt(list(prompts), torch.device(self.device), 1, False)
        return {"encoder_hidden_states": states.float()}

    def _more(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        return {}

    @classmethod
    def read_schedule(cls, model: ModelConfig) -> AlphaSchedule:
        """See ``Family.read_schedule``; the offset has to be what the stock pipeline would make of it."""
        found = super().read_schedule(model)
        if found.spacing == "leading" and found.offset != 1:
            raise ModelError(
                f"model {model.path!r} has steps_offset {found.offset} in its scheduler_config.json, which "
                "StableDiffusionPipeline takes for 1; write 1 there, or give another model.spacing"
            )
        return found

    @staticmethod
    def _stock(index: Mapping[str, Any], **parts: Any) -> Any:
        logging.getLogger("diffusers.pipelines.stable_diffusion").setLevel(logging.ERROR)
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


class SDXL(UNet):
    """StableDiffusionXLPipeline's checkpoints: the base, Turbo, DMD2's U-Net; no refiner.

    Its networks are told which size a picture had, where it was cropped and which size is asked for. Here pictures are
    as large as asked for, and whole: time_ids (R, R, 0, 0, R, R) of R pixels.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    extra_embedding = "text_time"
    text_suffixes = ("", "_2")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts as the stock pipeline encodes them.

        Returns:
            encoder_hidden_states [B, 77, D], of both encoders side by side, and text_embeds [B, P], float32.
        """
        states, _, pooled, _ = self._encoders().encode_prompt(
            list(prompts), device=torch.device(self.device), do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states.float(), "text_embeds": pooled.float()}

    def empty(self) -> Conditioning:
        """Zeros, where the checkpoint was trained with them in the place of an empty prompt (model_index.json)."""
        found = super().empty()
        if not self._encoders().config.force_zeros_for_empty_prompt:
            return found
        return {name: torch.zeros_like(tensor) for name, tensor in found.items()}

    def random_conditioning(self, generator: torch.Generator) -> Conditioning:
        """See ``Family.random_conditioning``."""
        found = super().random_conditioning(generator)
        width = _pooled_width(self.network.config)
        return {**found, "text_embeds": torch.randn(1, width, generator=generator)}

    def _more(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        height, width = (side * self._factor for side in x.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=x.device)
        return {"text_embeds": cond["text_embeds"], "time_ids": sizes.expand(len(x), -1)}

    @classmethod
    def _index(cls, model: ModelConfig) -> dict[str, Any]:
        index = super()._index(model)
        if index.get("text_encoder", [None])[0] is None:
            raise ModelError(f"model {model.path!r} has one text encoder alone, as a refiner; family 'sdxl' needs both")
        return index

    @staticmethod
    def _text_kind(suffix: str) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection if suffix == "_2" else CLIPTextModel

    @staticmethod
    def _stock(index: Mapping[str, Any], **parts: Any) -> Any:
        logging.getLogger("diffusers.pipelines.stable_diffusion_xl").setLevel(logging.ERROR)
        from diffusers import StableDiffusionXLPipeline

        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def _pooled_width(network: Any) -> int:
    """Of text_embeds; 0 where the network takes none."""
    if network.projection_class_embeddings_input_dim is None:
        return 0
    return int(network.projection_class_embeddings_input_dim) - NUM_TIME_IDS * int(network.addition_time_embed_dim)
