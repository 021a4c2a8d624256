"""Gauges that nobody optimises: how far pictures are from true ones, and how much those of one prompt differ.

Both look at an autoencoder's latents, in which no reward is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Gauge", "diversity", "kernel_distance"]

SUBSETS = 200
LEVEL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def kernel_distance(features: Tensor, true: Tensor, *, seed: int = 0) -> Gauge:
    """Squared maximum mean discrepancy with the kernel (x . y / d + 1)^3, as the kernel inception distance has it.

    Unbiased (arXiv 1801.01401 Eq. 4, here for two sizes): about 0, on either side, for two samples of one distribution.

    Args:
        features: [N, ...] of the pictures, flattened to d numbers.
        true: [M, ...] of true pictures.
        seed: of the bootstrap.

    Returns:
        The distance with the interval of a bootstrap over the pictures.

    Raises:
        ValueError: fewer than two of either.
    """
    ours, theirs = features.flatten(1).double(), true.flatten(1).double()
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"a distance needs at least two pictures of each, got {len(ours)} and {len(theirs)}")
    within, across = _kernel(ours, ours), _kernel(ours, theirs).mean(1)
    constant = _without_diagonal(_kernel(theirs, theirs))
    rng, found = np.random.default_rng(seed), list[float]()
    for _ in range(SUBSETS):
        # Some pictures, none twice: one that comes twice is like itself, and would look like a lack of variety.
        rows = torch.from_numpy(rng.permutation(len(ours))[: max(2, len(ours) // 2)])
        found.append(float(_without_diagonal(within[rows][:, rows]) + constant - 2 * across[rows].mean()))
    value = float(_without_diagonal(within) + constant - 2 * across.mean())
    # Halves vary around the whole by as much as the whole around the truth (delete-half jackknife).
    low, high = value + (np.percentile(found, LEVEL) - np.mean(found))
    return Gauge(value, float(low), float(high))


def diversity(features: Sequence[Tensor], *, seed: int = 0) -> Gauge:
    """Mean distance between two pictures of one prompt, over prompts.

    Args:
        features: of each prompt [S, ...], S >= 2 pictures at other seeds.
        seed: of the bootstrap over prompts.

    Returns:
        Root mean square per number, with the interval of a bootstrap over prompts.

    Raises:
        ValueError: a prompt has a single picture.
    """
    each = []
    for one in features:
        if len(one) < 2:
            raise ValueError("diversity needs at least two pictures of each prompt")
        flat = one.flatten(1).double()
        each.append(float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5))
    rng = np.random.default_rng(seed)
    means = np.asarray(each)[rng.integers(0, len(each), (2000, len(each)))].mean(1)
    low, high = np.percentile(means, LEVEL)
    return Gauge(float(np.mean(each)), float(low), float(high))


def _kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours @ theirs.T / ours.shape[1] + 1) ** 3


def _without_diagonal(kernel: Tensor) -> Tensor:
    """The mean over pairs of two different rows."""
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
