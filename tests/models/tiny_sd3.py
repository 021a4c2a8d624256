"""A random Stable Diffusion 3.5 medium in miniature: the same parts, options and file layout."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_WIDTH, T5_WIDTH = 16, 40
LETTERS = string.ascii_lowercase + string.digits + ",."


def clip_tokenizer() -> CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)


def clip_encoder(tokenizer: CLIPTokenizer, kind: Any, width: int, layers: int) -> Any:
    """A random text encoder of this class of transformers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.5,  # an encoder that is not in eval mode shows
    )
    return kind(config)


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.5,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _transformer(width: int, largest: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * CLIP_WIDTH,
        out_channels=16,
        pos_embed_max_size=largest,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _vae(blocks: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def make_tiny_sd3(
    folder: Path,
    *,
    seed: int = 0,
    width: int = 32,
    t5: bool = True,
    shift: float = 3.0,
    blocks: int = 2,
    largest: int = 12,
) -> Path:
    """Save a StableDiffusion3Pipeline with random weights, and return its folder.

    Latents are 16 x 8 x 8 and images 3 x 16 x 16; the same seed makes the same weights. ``blocks`` of the VAE halve a
    picture blocks - 1 times, and ``largest`` is the position embedding's size in patches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, second = clip_tokenizer(), _t5_tokenizer()
        parts: dict[str, Any] = {
            "transformer": _transformer(width, largest),
            "vae": _vae(blocks),
            "text_encoder": clip_encoder(clip, CLIPTextModelWithProjection, CLIP_WIDTH, 2),
            "text_encoder_2": clip_encoder(clip, CLIPTextModelWithProjection, CLIP_WIDTH, 2),
            "text_encoder_3": _t5(second) if t5 else None,
        }
    pipeline = StableDiffusion3Pipeline(
        **parts,
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=second if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipeline.save_pretrained(folder)
    return folder
