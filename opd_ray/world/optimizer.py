"""The optimizer of every training here: Muon for matrices and kernels, AdamW for the rest.

On two cores a step costs far more than its update, so the fewer steps the better: Muon reaches an
autoencoder error in 200 steps that AdamW reaches in 500.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOMENTUM = 0.9
# Quintic Newton-Schulz iteration towards the nearest orthogonal matrix (Jordan et al., Muon, 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def _orthogonal(matrix: Tensor, steps: int = 4) -> Tensor:
    out: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = out.shape[0] > out.shape[1]
    out = out.T if tall else out
    for _ in range(steps):
        gram = out @ out.T
        out = _A * out + (_B * gram + _C * gram @ gram) @ out
    return out.T if tall else out


class Optimizer:
    """Muon and AdamW behind one step, with warm-up and a half cosine down to zero."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        steps: int,
        matrix_rate: float,
        other_rate: float,
        plain: tuple[str, ...] = (),
    ) -> None:
        """Parameters whose name contains one of ``plain`` go to AdamW whatever their shape."""
        pairs = [(name, one) for name, one in named if one.requires_grad]
        self._matrices = [one for name, one in pairs if one.ndim >= 2 and not any(key in name for key in plain)]
        chosen = {id(one) for one in self._matrices}
        self._momenta = [torch.zeros_like(one) for one in self._matrices]
        self._others = [one for _, one in pairs if id(one) not in chosen]
        self._adam = torch.optim.AdamW(self._others, betas=(0.9, 0.99), weight_decay=1e-4)
        self._steps, self._step = steps, 0
        self._matrix_rate, self._other_rate = matrix_rate, other_rate

    def scale(self) -> float:
        """Share of the peak rates at this step: up over the first 4 %, then a half cosine."""
        warm = max(1, self._steps // 25)
        if self._step < warm:
            return (self._step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (self._step - warm) / max(1, self._steps - warm)))

    @torch.no_grad()
    def step(self) -> None:
        """Clip to norm 1, update, and forget the gradients."""
        scale = self.scale()
        torch.nn.utils.clip_grad_norm_([*self._matrices, *self._others], 1.0)
        for one, momentum in zip(self._matrices, self._momenta, strict=True):
            if one.grad is None:
                continue
            momentum.mul_(_MOMENTUM).add_(one.grad)
            update = _orthogonal((one.grad + _MOMENTUM * momentum).flatten(1)).view_as(one)
            rows, columns = one.flatten(1).shape
            one.add_(update, alpha=-scale * self._matrix_rate * max(1.0, rows / columns) ** 0.5)
            one.grad = None
        self._adam.param_groups[0]["lr"] = scale * self._other_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._step += 1
