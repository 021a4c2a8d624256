"""How far the student's step is from the teacher's (arXiv 2605.15055 Eq. 10-12), per sample.

Both are Gaussians with one covariance, so the KL is exact and needs no drawn sample. Its gradient
flows into whichever mean carries one; the teacher's is a constant because its forward had no graph.
"""

import torch
from torch import Tensor

from opd_ray.diffusion.shapes import (
    PerSample,
    Reduction,
    over_samples,
    reduce_dims,
    require_positive_std,
    require_same_shape,
)


def half_squared_distance(a: Tensor, b: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """1/2 ||a - b||^2: objective `mean` on step means (Eq. 12), equally on velocities or x0.

    Args:
        a: [B, ...].
        b: the same shape; never broadcast.
        reduction: over everything but the batch. Eq. 12 sums; training averages.

    Returns:
        [B], fp32, in squared units of the latents.
    """
    require_same_shape(a=a, b=b)
    return reduce_dims(0.5 * (a.float() - b.float()).square(), reduction)


def gaussian_kl(mean_p: Tensor, mean_q: Tensor, std: PerSample, *, reduction: Reduction) -> Tensor:
    """KL(N(mean_p, std^2) || N(mean_q, std^2)) = ||mean_p - mean_q||^2 / (2 std^2) (Eq. 10).

    Args:
        mean_p: [B, ...], the student's step mean.
        mean_q: the teacher's, same shape.
        std: the full transition std; one number, [B] or [B, 1, ..., 1].
        reduction: `sum` is the KL in nats (the metric); `mean`, per dimension, is objective `kl`.

    Returns:
        [B], fp32 (fp64 of fp64 means).

    Raises:
        ValueError: where std is 0, because the KL of a deterministic step is infinite.
    """
    require_same_shape(mean_p=mean_p, mean_q=mean_q)
    require_positive_std(std)
    # Divide before squaring: std^2 of a vanishing noise level (1e-23) would be 0 in fp32.
    wide = torch.promote_types(mean_p.dtype, torch.float32)
    gap = (mean_p.to(wide) - mean_q.to(wide)) / over_samples(std, mean_p)
    return reduce_dims(0.5 * gap.square(), reduction)
