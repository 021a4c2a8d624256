"""What a reward proves itself with before the first image counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """Two pictures, each with its prompt; a reward that works scores the first above the second."""

    better: tuple[Tensor, str]
    """[3, H, W] in [0, 1], and its prompt."""
    worse: tuple[Tensor, str]
    """Likewise."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of both prompts' row."""
