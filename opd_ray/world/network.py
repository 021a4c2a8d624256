"""The tiny Stable Diffusion 3: its parts, and the stock pipeline folder made of them."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from opd_ray.world.autoencoder import LATENT_CHANNELS
from opd_ray.world.vocabulary import MAX_TOKENS, clip_tokenizer, t5_tokenizer

WIDTH, LAYERS, HEADS = 96, 4, 4
LATENT_SIZE = 4
_CLIP_WIDTH = 48
TRAIN_TIMESTEPS = 1000


def _clip(vocab_size: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=_CLIP_WIDTH,
        intermediate_size=4 * _CLIP_WIDTH,
        projection_dim=_CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = CLIPTextModelWithProjection(config)
    # The default of 0.02 suits a long training; here tokens must differ from the first step.
    for name, table in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(table, std=0.3)
    return model


def _t5(vocab_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=HEADS,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def new_pipeline(vae: AutoencoderKL, shift: float) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder."""
    first, second, third = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(TRAIN_TIMESTEPS, shift=shift),
        vae=vae,
        text_encoder=_clip(len(first)),
        tokenizer=first,
        text_encoder_2=_clip(len(second)),
        tokenizer_2=second,
        text_encoder_3=_t5(len(third)),
        tokenizer_3=third,
    )


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in a folder, in float32 and without its progress bar."""
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder)).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for encoder in text_encoders(pipe):
        encoder.eval()
    return pipe


def save_pipeline(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save in float16. ``pipe`` itself is rounded: what is scored later is what was saved."""
    pipe.to(torch.float16)
    pipe.save_pretrained(str(folder), safe_serialization=True)


def text_encoders(pipe: StableDiffusion3Pipeline) -> list[nn.Module]:
    """The three text encoders, in the pipeline's order."""
    return [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]


def tokenize(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> Tensor:
    """Token ids for CLIP (both share a vocabulary) and T5, [B, 2, MAX_TOKENS]."""
    ids = [
        tokenizer(
            prompts,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_3)
    ]
    return torch.stack(ids, dim=1)


def encode_ids(pipe: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the stock pipeline's ``encode_prompt`` makes of ids [B, 2, L], with gradients.

    Gives the sequence [B, 2 L, WIDTH] and the pooled embedding [B, 2 * 48].
    """
    clip = [encoder(ids[:, 0], output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    sequence = torch.cat([out.hidden_states[-2] for out in clip], dim=-1)
    sequence = nn.functional.pad(sequence, (0, WIDTH - sequence.shape[-1]))
    sequence = torch.cat([sequence, pipe.text_encoder_3(ids[:, 1])[0]], dim=1)
    return sequence, torch.cat([out.text_embeds for out in clip], dim=-1)


def velocity(transformer: nn.Module, x: Tensor, t: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
    """The predicted velocity eps - x0 at x [B, 16, 4, 4] and t [B] in [0, 1]."""
    out = transformer(
        hidden_states=x,
        timestep=t * TRAIN_TIMESTEPS,
        encoder_hidden_states=context[0],
        pooled_projections=context[1],
        return_dict=False,
    )[0]
    assert isinstance(out, Tensor)
    return out
