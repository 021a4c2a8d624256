"""How one number per sample meets a batch of latents, and how latents become one number each."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

PerSample: TypeAlias = float | Tensor
"""One number for the whole batch (float, 0-d tensor), or one a sample: [B] or [B, 1, ..., 1]."""

Reduction: TypeAlias = Literal["sum", "mean"]
"""Over everything but the batch. The paper sums; learning rates are tuned for means."""


def full(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is already: what steps are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def over_samples(value: PerSample, x: Tensor) -> Tensor:
    """Shape `value` in `full(x)`'s type so that it multiplies `x` sample by sample, whatever its dimensions.

    Args:
        value: a float, a 0-d tensor, [B], or [B, 1, ..., 1] with as many dimensions as `x`.
        x: [B, ...].

    Returns:
        0-d, or [B, 1, ..., 1]. A single number stays on its device: 0-d CPU tensors mix with any
        device, without a copy and without waiting for the accelerator.

    Raises:
        ValueError: for every other shape; by broadcasting alone [B] would land on the last
            dimension, and [1, S, 1, 1, 1] on the channels.
    """
    value = torch.as_tensor(value, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if value.ndim == 0:
        return value
    column = (x.shape[0],) + (1,) * (x.ndim - 1)
    if value.shape not in (column, column[:1]):
        raise ValueError(
            f"a value of shape {list(value.shape)} cannot go over the samples of {list(x.shape)}: "
            f"give one number, or one per sample with shape {list(column[:1])} or {list(column)}"
        )
    return value.to(x.device).reshape(column)


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse shapes that broadcasting would let through: shared noise, padded teachers."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal, got {seen}")


def require_positive_std(std: PerSample) -> None:
    """Refuse a density or a divergence of a deterministic step, instead of clamping the division.

    A clamp at 1e-8 turns std 0 into a loss 1e8 times too large that still looks like a number.
    """
    if not bool((torch.as_tensor(std) > 0).all()):
        raise ValueError(
            "std is 0 (or not a number): a deterministic step has no density and no KL. Raise the "
            "noise level, leave this step out, or compare means (half_squared_distance)"
        )


def reduce_dims(values: Tensor, reduction: Reduction) -> Tensor:
    """Sum or average [B, ...] over everything but the batch, to [B]."""
    if reduction == "sum":
        return values.flatten(1).sum(1)
    if reduction == "mean":
        return values.flatten(1).mean(1)
    raise ValueError(f"reduction {reduction!r} is unknown. Known: 'sum', 'mean'")
