"""Flow matching: the base with its text encoders, from nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from opd_ray.world.captions import parse
from opd_ray.world.dataset import Dataset
from opd_ray.world.network import (
    encode_ids,
    text_encoders,
    tokenize,
    velocity,
)
from opd_ray.world.optimizer import Optimizer

Tick = Callable[[int, dict[str, float]], None]

_PLAIN = ("embed", "norm", "shared", "proj_out", "relative_attention_bias")
"""Parameters that are tables, gains or read-outs rather than matrices between features."""


@dataclass(frozen=True)
class Fit:
    """How long and how hard to train."""

    steps: int
    batch: int
    matrix_rate: float
    other_rate: float
    dropout: float
    """Share of captions replaced by the empty one, so that guidance has something to subtract."""
    focus: str | None = None
    """A task that half of each batch is drawn from; the other half is drawn from everything."""
    centre: float = 0.0
    """Mean of t's logit: above 0 for more of the noisy end, where a caption decides what is where."""


def _pair(x0: Tensor, centre: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the velocity to learn. t is logit-normal, wide enough to reach both ends."""
    t = torch.sigmoid(centre + 1.2 * torch.randn(len(x0)))
    noise = torch.randn_like(x0)
    wide = t.view(-1, 1, 1, 1)
    return (1 - wide) * x0 + wide * noise, t, noise - x0


def _ids(pipe: StableDiffusion3Pipeline, captions: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Ids of all captions [N, K, 2, L] and of the empty caption [2, L]."""
    ids = tokenize(pipe, [caption for each in captions for caption in each])
    return ids.view(len(captions), -1, *ids.shape[1:]), tokenize(pipe, [""])[0]


def _focus(captions: list[list[str]], task: str | None) -> Tensor:
    """The pictures of a task, or all."""
    chosen = [i for i, each in enumerate(captions) if task in (None, parse(each[0]).task)]
    return torch.tensor(chosen)


def _batch(data: Dataset, ids: Tensor, empty: Tensor, focus: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, len(data.latents), (fit.batch,))
    half = fit.batch // 2
    rows[:half] = focus[torch.randint(0, len(focus), (half,))]
    chosen = ids[rows, torch.randint(0, ids.shape[1], (fit.batch,))]
    dropped = torch.rand(fit.batch) < fit.dropout
    return data.latents[rows], torch.where(dropped[:, None, None], empty, chosen)


def train_base(pipe: StableDiffusion3Pipeline, data: Dataset, fit: Fit, seed: int, tick: Tick) -> None:
    """Train transformer and text encoders together, in place."""
    torch.manual_seed(seed)
    ids, empty = _ids(pipe, data.captions)
    focus = _focus(data.captions, fit.focus)
    trained = nn.ModuleList([pipe.transformer, *text_encoders(pipe)])
    trained.train()
    optimizer = Optimizer(trained.named_parameters(), fit.steps, fit.matrix_rate, fit.other_rate, plain=_PLAIN)
    for _ in range(fit.steps):
        x0, chosen = _batch(data, ids, empty, focus, fit)
        x, t, target = _pair(x0, fit.centre)
        predicted = velocity(pipe.transformer, x, t, encode_ids(pipe, chosen))
        loss = (predicted - target).square().mean()
        loss.backward()
        optimizer.step()
        tick(1, {"loss": float(loss.detach())})
    trained.eval()
