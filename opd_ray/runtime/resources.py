"""What a worker asks of a node, by Ray's names."""

from collections.abc import Mapping

__all__ = ["amounts", "ray_resources"]

NAMES = {"cpu": "CPU", "gpu": "GPU"}


def ray_resources(resources: Mapping[str, float]) -> dict[str, float]:
    """A placement's ``resources`` as Ray is asked for them; what is 0 is not asked for."""
    return {NAMES.get(name, name): amount for name, amount in resources.items() if amount > 0}


def amounts(resources: Mapping[str, float]) -> str:
    """For messages, for instance ``{CPU: 2, teacher_node: 1}``."""
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"
