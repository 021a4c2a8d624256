"""The sigmas a trajectory visits, and which of its steps are trained."""

from collections.abc import Sequence

import torch
from torch import Tensor


def flow_sigmas(num_steps: int, shift: float, *, num_train_timesteps: int = 1000) -> Tensor:
    """The schedule of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift), bit for bit.

    Args:
        num_steps: N, the number of denoising steps.
        shift: s in sigma <- s sigma / (1 + (s - 1) sigma); SD3 uses 3.
        num_train_timesteps: the model's clock; network timestep = num_train_timesteps * sigma.

    Returns:
        [N + 1] fp32 on the CPU, strictly falling from 1 (noise) to 0 (image).
    """
    if num_steps < 1 or num_train_timesteps < 1 or not shift > 0:
        raise ValueError(
            "a schedule needs num_steps >= 1, shift > 0 and num_train_timesteps >= 1, got "
            f"{num_steps}, {shift} and {num_train_timesteps}"
        )

    def shifted(sigma: Tensor) -> Tensor:
        return shift * sigma / (1 + (shift - 1) * sigma)

    # The ends of the training clock are shifted in fp32, the grid between them once more in
    # float64. That second shift of an already shifted end makes the last non-zero sigma tiny.
    clock = torch.tensor([num_train_timesteps, 1], dtype=torch.float32)
    ends = shifted(clock / num_train_timesteps).double() * num_train_timesteps
    stride = (ends[1] - ends[0]) / max(num_steps - 1, 1)
    grid = ends[0] + stride * torch.arange(num_steps, dtype=torch.float64)
    return torch.cat([shifted(grid / num_train_timesteps).float(), torch.zeros(1)])


def trained_steps(num_steps: int, fraction: float = 0.99) -> tuple[int, ...]:
    """The first int(fraction * num_steps) steps; 0.99 leaves out the last, of vanishing length."""
    if not 0 < fraction <= 1 or int(fraction * num_steps) < 1:
        raise ValueError(
            f"fraction {fraction} of {num_steps} steps trains no step or too many: it must be in "
            "(0, 1] and leave at least one"
        )
    return tuple(range(int(fraction * num_steps)))


def choose_steps(steps: Sequence[int], count: int | None, seed: int) -> tuple[int, ...]:
    """A random subset of `count` steps, ascending, the same for the same seed on every worker.

    Args:
        steps: step indices to choose from.
        count: how many; None, or at least as many as there are, takes all.
        seed: a folded seed; the draw is on a CPU generator and touches no global state.
    """
    if count is None or count >= len(steps):
        return tuple(sorted(steps))
    if count < 1:
        raise ValueError(f"count of trained steps must be at least 1, got {count}")
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(steps[int(i)] for i in order[:count]))
