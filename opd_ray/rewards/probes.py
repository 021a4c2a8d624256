"""What a reward proves itself by: pairs of pictures that a working one ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Probe", "probed"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Probe:
    """Two pictures with their prompts, of which a working reward scores the first one higher."""

    better: tuple[Tensor, str]
    """[3, H, W] in [0, 1], and its prompt."""
    worse: tuple[Tensor, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of both prompts, for a reward that asks for it."""


def probed(probes: Callable[[], Sequence[Probe]]) -> Callable[[Function], Function]:
    """Give a reward that is a function what a class has as its method ``probes``."""

    def declare(function: Function) -> Function:
        function.probes = probes  # type: ignore[attr-defined]
        return function

    return declare
