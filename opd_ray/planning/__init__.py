"""What a run will need, and whether this machine has it, before it starts."""

from opd_ray.planning.memory import Need, check_memory, check_teacher_memory, needs

__all__ = ["Need", "check_memory", "check_teacher_memory", "needs"]
