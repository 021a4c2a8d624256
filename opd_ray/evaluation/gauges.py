"""Gauges that nobody optimises: how far pictures are from true ones, and how much those of one prompt differ.

Both look at an autoencoder's latents, in which no reward is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Gauge", "diversity", "kernel_distance", "mean_of", "over_seeds"]

RESAMPLES = 500
LEVEL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number and its 95 % interval."""

    value: float
    drawn: tuple[float, ...]
    """The same of each bootstrap sample, around the value."""

    @property
    def low(self) -> float:
        """Where the interval begins."""
        return float(np.percentile(self.drawn, LEVEL[0]))

    @property
    def high(self) -> float:
        """Where it ends."""
        return float(np.percentile(self.drawn, LEVEL[1]))


def kernel_distance(features: Tensor, true: Tensor, *, paired: bool = False, seed: int = 0) -> Gauge:
    """Squared maximum mean discrepancy with the kernel (x . y / d + 1)^3, as the kernel inception distance has it.

    Unbiased (arXiv 1801.01401 Eq. 4, here for two sizes): about 0, on either side, for two samples of one distribution.

    Args:
        features: [N, ...] of the pictures, flattened to d numbers.
        true: [M, ...] of true pictures.
        paired: the n-th true picture is of the n-th one's prompt, so a bootstrap sample has both or neither.
        seed: of the bootstrap.

    Returns:
        The distance with the interval of a bootstrap over the pictures, and over the true ones.

    Raises:
        ValueError: fewer than two of either, or pairs that are none.
    """
    ours, theirs = features.flatten(1).double(), true.flatten(1).double()
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"a distance needs at least two pictures of each, got {len(ours)} and {len(theirs)}")
    if paired and len(ours) != len(theirs):
        raise ValueError(f"pairs need as many pictures as true ones, got {len(ours)} and {len(theirs)}")
    within, across, around = _kernel(ours, ours), _kernel(ours, theirs), _kernel(theirs, theirs)

    def distance(rows: Tensor, columns: Tensor) -> float:
        own, true = within[rows][:, rows], around[columns][:, columns]
        return float(_without_diagonal(own) + _without_diagonal(true) - 2 * across[rows][:, columns].mean())

    rng, found = np.random.default_rng(seed), list[float]()
    for _ in range(RESAMPLES):
        # Some pictures, none twice: one that comes twice is like itself, and would look like a lack of variety.
        rows = _half(rng, len(ours))
        found.append(distance(rows, rows if paired else _half(rng, len(theirs))))
    value = distance(torch.arange(len(ours)), torch.arange(len(theirs)))
    # Halves vary around the whole by as much as the whole around the truth (delete-half jackknife).
    return Gauge(value, tuple((value + np.asarray(found) - np.mean(found)).tolist()))


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
    means = np.asarray(each)[rng.integers(0, len(each), (RESAMPLES, len(each)))].mean(1)
    return Gauge(float(np.mean(each)), tuple(means.tolist()))


def mean_of(gauges: Sequence[Gauge]) -> Gauge:
    """The mean of several that were taken apart, as of the tasks of a model; each with a ``seed`` of its own."""
    return Gauge(float(np.mean([one.value for one in gauges])), tuple(_drawn(gauges).mean(0).tolist()))


def over_seeds(gauges: Sequence[Gauge], *, seed: int = 0) -> Gauge:
    """The mean over training seeds, with a bootstrap on two levels: seeds are drawn again with their number, too."""
    drawn, rng = _drawn(gauges), np.random.default_rng(seed)
    rows = rng.integers(0, len(gauges), (drawn.shape[1], len(gauges)))
    again = drawn[rows, np.arange(drawn.shape[1])[:, None]].mean(1)
    return Gauge(float(np.mean([one.value for one in gauges])), tuple(again.tolist()))


def _drawn(gauges: Sequence[Gauge]) -> npt.NDArray[np.float64]:
    return np.asarray([one.drawn for one in gauges], dtype=np.float64)


def _half(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(rng.permutation(count)[: max(2, count // 2)])


def _kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours @ theirs.T / ours.shape[1] + 1) ** 3


def _without_diagonal(kernel: Tensor) -> Tensor:
    """The mean over pairs of two different rows."""
    count = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))
