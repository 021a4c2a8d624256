"""The second base: a U-Net that predicts noise, as Stable Diffusion 1.5 does, and its distillation to few steps.

The same autoencoder and captions as the first base, in the layout of `StableDiffusionPipeline`.

Distillation, by regression to the ends of the teacher's own paths: a rendered picture's latent is noised to one of the
few timesteps, the guided teacher walks from there to the picture by DDIM, and the student learns to predict in one
step, without guidance, where it arrived. To sample, each prediction is noised again (as in multistep consistency
sampling, arXiv 2303.01469, Algorithm 1), so what the student sees is close to what it was trained on at every step.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from opd_ray.world.autoencoder import LATENT_CHANNELS, new_autoencoder
from opd_ray.world.dataset import Dataset
from opd_ray.world.network import LATENT_SIZE, TRAIN_TIMESTEPS
from opd_ray.world.optimizer import Optimizer
from opd_ray.world.training import Fit, Tick
from opd_ray.world.vocabulary import MAX_TOKENS, clip_tokenizer

WIDTH, TEXT_WIDTH, HEADS = 80, 80, 4
FEW = (999, 749, 499, 249)
"""Timesteps of the distilled model's four steps; two steps take every other one, one step the first."""
STEPS = 50
_SUBSTEPS = 8
"""DDIM steps of the teacher's between two neighbours of FEW."""
_PLAIN = ("embed", "norm", "conv_in", "conv_out", "time_emb")
_BATCH = 256
_LARGEST_WEIGHT = 10.0
_SCHEDULE = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
"""Stable Diffusion's own."""


def centred(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder without a shift factor, which StableDiffusionPipeline knows nothing of.

    Its two 1x1 convolutions, which the first base's has not, carry the shift.
    """
    made = new_autoencoder(scaling=vae.config.scaling_factor, quant=True)
    shift, eye = vae.config.shift_factor, torch.eye
    with torch.no_grad():
        made.load_state_dict(
            vae.state_dict()
            | {
                "quant_conv.weight": eye(2 * LATENT_CHANNELS)[:, :, None, None],
                "quant_conv.bias": torch.tensor([-shift] * LATENT_CHANNELS + [0.0] * LATENT_CHANNELS),
                "post_quant_conv.weight": eye(LATENT_CHANNELS)[:, :, None, None],
                "post_quant_conv.bias": torch.full((LATENT_CHANNELS,), shift),
            }
        )
    return made.eval()


def new_unet_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """An untrained pipeline around a trained autoencoder."""
    tokenizer = clip_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    for name, table in text.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(table, std=0.3)  # tokens must differ from the first step
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(WIDTH,),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        **_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionPipeline(
        vae=centred(vae),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_unet_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in a folder, in float32 and without its progress bar."""
    pipe = StableDiffusionPipeline.from_pretrained(str(folder)).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    return pipe


def context_of(pipe: StableDiffusionPipeline, ids: Tensor) -> Tensor:
    """What the stock pipeline's ``encode_prompt`` makes of ids [B, L], with gradients: [B, L, TEXT_WIDTH]."""
    found = pipe.text_encoder(ids)[0]
    assert isinstance(found, Tensor)
    return found


def tokens(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Token ids [B, MAX_TOKENS]."""
    ids = pipe.tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    assert isinstance(ids, Tensor)
    return ids


def train_unet(pipe: StableDiffusionPipeline, data: Dataset, fit: Fit, seed: int, tick: Tick) -> None:
    """Train U-Net and text encoder together, in place, to predict the noise."""
    torch.manual_seed(seed)
    alphas = pipe.scheduler.alphas_cumprod
    each = len(data.captions[0])
    ids = tokens(pipe, [caption for captions in data.captions for caption in captions]).view(-1, each, MAX_TOKENS)
    empty = tokens(pipe, [""])
    trained = nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    optimizer = Optimizer(trained.named_parameters(), fit.steps, fit.matrix_rate, fit.other_rate, plain=_PLAIN)
    for _ in range(fit.steps):
        rows = torch.randint(0, len(data.latents), (fit.batch,))
        chosen = ids[rows, torch.randint(0, each, (fit.batch,))]
        chosen = torch.where(torch.rand(fit.batch, 1) < fit.dropout, empty, chosen)
        t = torch.randint(0, TRAIN_TIMESTEPS, (fit.batch,))
        signal, noise = alphas[t].view(-1, 1, 1, 1).sqrt(), torch.randn(fit.batch, *data.latents.shape[1:])
        x = signal * data.latents[rows] + (1 - signal.square()).sqrt() * noise
        error = pipe.unet(x, t, context_of(pipe, chosen)).sample - noise
        # An error of the noise is one of the velocity's, divided by the signal: where there is little, it decides most.
        weight = signal.square().reciprocal().clamp(max=_LARGEST_WEIGHT)
        loss = (weight * error.square()).mean()
        loss.backward()
        optimizer.step()
        tick(1, {"loss": float(loss.detach())})
    trained.eval()


@dataclass(frozen=True)
class Ends:
    """Where the teacher's paths began and ended."""

    states: Tensor
    """[N, 16, 4, 4], variance preserving."""
    timesteps: Tensor
    """[N]."""
    contexts: Tensor
    """[N, L, TEXT_WIDTH]."""
    ends: Tensor
    """[N, 16, 4, 4]: the teacher's clean latents."""


@torch.no_grad()
def teacher_ends(
    pipe: StableDiffusionPipeline, data: Dataset, count: int, guidance: float, seed: int, tick: Callable[[int], None]
) -> Ends:
    """Walk ``count`` paths of the guided teacher: as many from each of FEW."""
    torch.manual_seed(seed)
    alphas, empty = pipe.scheduler.alphas_cumprod, context_of(pipe, tokens(pipe, [""]))
    found: list[tuple[Tensor, ...]] = []
    for number, start in enumerate(range(0, count, _BATCH)):
        size, begin = min(_BATCH, count - start), number % len(FEW)
        rows = torch.randint(0, len(data.latents), (size,)).tolist()
        context = context_of(pipe, tokens(pipe, [data.captions[row][0] for row in rows]))
        signal, x0 = alphas[FEW[begin]].sqrt(), data.latents[rows]
        begun = x = signal * x0 + (1 - signal.square()).sqrt() * torch.randn_like(x0)
        grid = torch.linspace(FEW[begin], -1, _SUBSTEPS * (len(FEW) - begin) + 1).round().long().tolist()
        both = torch.cat([empty.expand_as(context), context])
        for t, then in itertools.pairwise(grid):
            without, given = pipe.unet(torch.cat([x, x]), t, both).sample.chunk(2)
            noise = without + guidance * (given - without)
            clean = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
            after = alphas[then] if then >= 0 else torch.ones(())
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
        found.append((begun, torch.full((size,), FEW[begin]), context, x))
        tick(size)
    return Ends(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def train_few(pipe: StableDiffusionPipeline, ends: Ends, fit: Fit, seed: int, tick: Tick) -> None:
    """Train the U-Net, in place, to see where a path ends; the text encoder stays the teacher's."""
    torch.manual_seed(seed)
    alphas = pipe.scheduler.alphas_cumprod
    pipe.unet.train()
    optimizer = Optimizer(pipe.unet.named_parameters(), fit.steps, fit.matrix_rate, fit.other_rate, plain=_PLAIN)
    for _ in range(fit.steps):
        rows = torch.randint(0, len(ends.states), (fit.batch,))
        x, t = ends.states[rows], ends.timesteps[rows]
        kept = alphas[t].view(-1, 1, 1, 1)
        noise = pipe.unet(x, t, ends.contexts[rows]).sample
        clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
        loss = (clean - ends.ends[rows]).square().mean()
        loss.backward()
        optimizer.step()
        tick(1, {"loss": float(loss.detach())})
    pipe.unet.eval()
    pipe.scheduler = EulerAncestralDiscreteScheduler(
        **_SCHEDULE, timestep_spacing="trailing", steps_offset=1
    )  # SDXL Turbo's
