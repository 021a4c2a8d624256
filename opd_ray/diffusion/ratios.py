"""How likely one policy is to make a step that was made, against another policy of the same transition std.

Written with differences of means: two log-densities of a thousand nats each, subtracted, would leave rounding errors as
large as the ratios that matter here (published clip ranges are 1e-4 and below).
"""

import torch
from torch import Tensor

from opd_ray.diffusion.shapes import require_positive_std, require_same_shape


def log_ratio(x_next: Tensor, mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """Log N(x_next; mean, std^2) - log N(x_next; other, std^2), averaged over C, H, W.

    With d = mean - other it is mean(d (2 (x_next - other) - d)) / (2 std^2): exactly 0 where the means are equal.

    Args:
        x_next: [B, C, H, W], the state that was drawn; a constant.
        mean: the same shape; carries the gradient.
        other: the same shape; a constant.
        std: of the whole transition; 0-d or [B, 1, 1, 1].

    Returns:
        [B] in ``mean``'s type; nats per dimension, as published clip ranges and betas expect.

    Raises:
        ValueError: where std is 0, because a deterministic step has no density.
    """
    require_same_shape(x_next=x_next, mean=mean, other=other)
    require_positive_std(std)
    gap, drawn = (mean - other.detach()) / std, (x_next.detach() - other.detach()) / std
    return (gap * (drawn - 0.5 * gap)).flatten(1).mean(1)


def normalised_log_ratio(x_next: Tensor, mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): ``log_ratio`` without its bias, times std.

    With D = other - mean and x_next = other + std eps it is std (log_ratio + mean(D^2) / (2 std^2)) = -mean(D eps), and
    centred at 0. Arguments, result and errors are ``log_ratio``'s.
    """
    require_same_shape(x_next=x_next, mean=mean, other=other)
    require_positive_std(std)
    other = other.detach()
    return ((mean - other) * ((x_next.detach() - other) / std)).flatten(1).mean(1)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log_ratio), PPO's loss (arXiv 1707.06347 Eq. 7).

    Args:
        log_ratio: [B].
        advantage: [B], a constant.
        clip: range of the ratio.

    Returns:
        [B].
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
