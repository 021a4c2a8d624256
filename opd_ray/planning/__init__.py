"""What a run will need, before it starts."""

from opd_ray.planning.memory import Need, check_memory, needs

__all__ = ["Need", "check_memory", "needs"]
