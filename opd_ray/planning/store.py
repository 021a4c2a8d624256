"""What a round puts into the object store, from the configuration alone, and how many rounds may be under way."""

from opd_ray.algorithms import Algorithm
from opd_ray.config import Config
from opd_ray.errors import PlacementError
from opd_ray.models.base import family_class

__all__ = ["round_bytes", "rounds_that_fit"]

FLOAT = 4
WEIGHTS = "weights"
"""The part of a round that is the version it is drawn with."""


def round_bytes(config: Config, algorithm: Algorithm, tasks: int) -> dict[str, int]:
    """Bytes of one round by part, at most; empty where the family does not say its shape or nothing is drawn.

    Raises:
        UserError: the model's configs cannot be read.
    """
    shape = family_class(config.model.family).shape(config.model) if config.recorded is None else None
    if shape is None:
        return {}
    trained = algorithm.trained_steps(config.sampling.steps)
    marked = len(trained) if algorithm.steps_per_item is None else min(algorithm.steps_per_item, len(trained))
    whole = algorithm.whole_paths or algorithm.needs_rewards
    behind = max(trained, default=0) + algorithm.needs_velocities  # the last state that anybody reads
    states = (config.sampling.steps if whole else behind) + 1
    items = (tasks if config.batch.tasks == "together" else 1) * (
        config.batch.images_per_task // config.batch.item_size
    )
    pictures = items * config.batch.item_size
    if config.pairs is not None:
        pairs = config.batch.images_per_task * (2 * shape.latent + shape.conditioning)
        empty = config.batch.images_per_task // config.batch.item_size * shape.conditioning
        return {"pairs": (pairs + empty) * FLOAT} | (
            {WEIGHTS: shape.parameters["denoiser"] * FLOAT} if config.student.lora is None else {}
        )
    drawn = states - 1 if algorithm.needs_velocities else 0
    found = {
        "trajectories": pictures * ((states + drawn) * shape.latent + shape.conditioning) + items * shape.conditioning,
        "teachers' answers": pictures * marked * shape.latent if algorithm.needs_teachers else 0,
        # A LoRA is not worth counting.
        WEIGHTS: shape.parameters["denoiser"] if config.student.lora is None else 0,
        "pictures": pictures * algorithm.pictures * 3 * shape.pixels**2 if algorithm.needs_rewards else 0,
    }
    return {part: count * FLOAT for part, count in found.items() if count}


def rounds_that_fit(parts: dict[str, int], capacity: int, fraction: float) -> int | None:
    """How many rounds fit into a part of one node's store; None where their size is not known.

    Args:
        parts: what ``round_bytes`` gave.
        capacity: bytes of the node that has the least.
        fraction: the part of it that may be filled.

    Raises:
        PlacementError: not even one does; with the sum.
    """
    if not parts:
        return None
    following = parts.get(WEIGHTS, 0)  # is published while the last round is not yet let go
    total, room = sum(parts.values()), capacity * fraction - following
    if total > room:
        amounts = " + ".join(f"{part} {_mb(count)}" for part, count in parts.items())
        amounts += f"; the version after it {_mb(following)}" if following else ""
        raise PlacementError(
            f"a round needs {_mb(total + following)} MB of object store ({amounts}), and {fraction:g} of the smallest "
            f"node's {_mb(capacity)} MB is {_mb(room + following)} MB; lower batch.images_per_task, or raise "
            "cluster.object_store_mb (of a Ray that was there before: --object-store-memory of its nodes)"
        )
    return int(room // total)


def _mb(count: float) -> str:
    return f"{count / 2**20:,.1f}"
