"""Stable Diffusion 3 and 3.5 through diffusers' own parts.

Dual attention and query/key norms (3.5 medium, 3.5 large) come with the transformer's config.
"""

import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models.autoencoder import KLAutoencoder, vae_factor
from opd_ray.models.base import Shape, count_numbers
from opd_ray.models.checkpoint import fetch_part, load_component, read_config, refusing
from opd_ray.types import Conditioning

__all__ = ["SD3"]

CLIP_TOKENS = 77


class SD3(KLAutoencoder):
    """StableDiffusion3Pipeline's checkpoints, with or without the T5 encoder."""

    @classmethod
    def latent_size(cls, model: ModelConfig, network: Any) -> int:
        """See ``KLAutoencoder.latent_size``.

        Raises:
            ModelError: the asked for resolution does not divide into patches, or is larger than the position embedding.
        """
        if model.resolution is None:
            return int(network.sample_size)
        factor = vae_factor(model)
        unit = factor * network.patch_size
        largest = network.pos_embed_max_size * unit
        if model.resolution % unit or model.resolution > largest:
            raise ModelError(
                f"model.resolution {model.resolution} does not fit {model.path!r}: expected a multiple of {unit} up to "
                f"{largest}, for instance {min(max(round(model.resolution / unit), 1) * unit, largest)}"
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
        index = _index(model)
        from diffusers import AutoencoderKL, SD3Transformer2DModel

        network = load_component(SD3Transformer2DModel, model, "transformer", device, dtype)
        vae = load_component(AutoencoderKL, model, "vae", device) if image else None
        pipeline = _text_pipeline(model, index, network, device, dtype) if text else None
        return cls(model, network, text=pipeline, vae=vae, device=device, dtype=dtype)

    @classmethod
    def skeleton(cls, model: ModelConfig) -> nn.Module:
        """See ``Family.skeleton``."""
        from diffusers import SD3Transformer2DModel

        _index(model)
        config = read_config(model, "transformer/config.json")
        if config.get("guidance_embeds"):
            raise ModelError(
                f"model {model.path!r} takes guidance as an input of its network; family 'sd3' guides by two forwards, "
                "so guidance would be applied twice"
            )
        with refusing(f"model {model.path!r}: its transformer"), torch.device("meta"):
            network: nn.Module = SD3Transformer2DModel.from_config(config)
        cls.latent_size(model, network.config)
        return network

    @classmethod
    def shape(cls, model: ModelConfig) -> Shape:
        """See ``Family.shape``; parts are counted on the meta device."""
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        index, network = _index(model), cls.skeleton(model)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read_config(model, "vae/config.json"))
            text: list[nn.Module] = []
            for suffix in ("", "_2", "_3"):
                if index.get(f"text_encoder{suffix}", [None])[0] is None:
                    continue
                config = read_config(model, f"text_encoder{suffix}/config.json")
                t5 = suffix == "_3"
                text.append(
                    T5EncoderModel(T5Config(**config)) if t5 else CLIPTextModelWithProjection(CLIPTextConfig(**config))
                )
        own: Any = network.config
        size = cls.latent_size(model, own)
        return Shape(
            parameters={
                "denoiser": count_numbers(network),
                "text": sum(map(count_numbers, text)),
                "vae": count_numbers(vae),
            },
            layers=own.num_layers,
            width=own.num_attention_heads * own.attention_head_dim,
            tokens=(size // own.patch_size) ** 2 + CLIP_TOKENS + model.max_sequence_length,
            pixels=size * vae_factor(model),
            latent=own.in_channels * size**2,
            conditioning=(CLIP_TOKENS + model.max_sequence_length) * own.joint_attention_dim
            + own.pooled_projection_dim,
            buffers=sum(buffer.numel() for buffer in network.buffers()),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts as the stock pipeline encodes them.

        Returns:
            encoder_hidden_states [B, L, D] and pooled_projections [B, P], float32. L is CLIP's 77
            and the T5 tokens, which are zeros where the checkpoint has no T5.
        """
        if self._text is None:
            raise ModelError(f"model {self.model.path!r} was loaded without its text encoders")
        length = self.model.max_sequence_length
        if self._text.tokenizer_3 is not None:
            length = min(length, self._text.tokenizer_3.model_max_length)
        states, _, pooled, _ = self._text.encode_prompt(
            list(prompts),
            None,
            None,
            device=torch.device(self.device),
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """See ``Family.predict``."""
        answer: Tensor = self.denoiser(hidden_states=x, timestep=self.clock(t), return_dict=False, **cond)[0]
        return answer

    def random_conditioning(self, generator: torch.Generator) -> Conditioning:
        """See ``Family.random_conditioning``."""
        config = self.network.config
        return {
            "encoder_hidden_states": torch.randn(1, 4, config.joint_attention_dim, generator=generator),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        }

    @classmethod
    def fingerprint(cls, model: ModelConfig) -> dict[str, object]:
        """See ``Family.fingerprint``."""
        _index(model)
        vae = read_config(model, "vae/config.json")
        return {
            "latent channels": vae["latent_channels"],
            "pixels a latent": vae_factor(model),
            "VAE scaling factor": vae["scaling_factor"],
            "VAE shift factor": vae["shift_factor"],
            "prediction": "velocity",
            **cls.read_schedule(model).facts(),
        }


def _index(model: ModelConfig) -> dict[str, Any]:
    index = read_config(model, "model_index.json")
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        raise ModelError(
            f"model {model.path!r} is a {index.get('_class_name')}; family 'sd3' loads StableDiffusion3Pipeline"
        )
    return index


def _text_pipeline(
    model: ModelConfig, index: dict[str, Any], network: nn.Module, device: str, dtype: torch.dtype
) -> Any:
    """The stock pipeline with nothing but what ``encode_prompt`` reads."""
    # Both cut long prompts as the method does, and would print each of them whole.
    for chatty in ("diffusers.pipelines.stable_diffusion_3", "transformers.tokenization_utils_base"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from diffusers import StableDiffusion3Pipeline
    from transformers import (
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5EncoderModel,
        T5TokenizerFast,
    )

    clip = (CLIPTextModelWithProjection, CLIPTokenizer)
    kinds = {"": clip, "_2": clip, "_3": (T5EncoderModel, T5TokenizerFast)}
    parts: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    for suffix, (encoder_kind, tokenizer_kind) in kinds.items():
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        if suffix == "_3" and index.get(encoder, [None])[0] is None:
            continue  # published without T5
        parts[encoder] = load_component(encoder_kind, model, encoder, device, dtype)
        with refusing(f"model {model.path!r}: its {tokenizer} cannot be loaded"):
            parts[tokenizer] = tokenizer_kind.from_pretrained(fetch_part(model, tokenizer))
    return StableDiffusion3Pipeline(transformer=network, scheduler=None, vae=None, **parts)
