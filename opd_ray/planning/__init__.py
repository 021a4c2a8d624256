"""What a run will need, and whether this machine has it, before it starts."""

from opd_ray.planning.memory import Need, check_memory, check_teacher_memory, needs
from opd_ray.planning.store import round_bytes, rounds_that_fit

__all__ = ["Need", "check_memory", "check_teacher_memory", "needs", "round_bytes", "rounds_that_fit"]
