"""What to change about a run, in sentences that a person can follow."""

from collections.abc import Iterable

from opd_ray.report.run_folder import Round, RunFolder, mapping
from opd_ray.report.wording import size

__all__ = ["advice", "store_advice"]


def store_advice(rounds: Iterable[Round], max_staleness: int | None = None) -> str:
    """What to do where Ray's object store spilled to disk; empty where it did not.

    Args:
        rounds: a run's rows. ``spilled`` only rises while a Ray lives; one that fell is that of another Ray.
        max_staleness: the run's; where it is 0, nobody is told to lower it.
    """
    spilled = before = 0.0
    for row in rounds:
        now = row.store.get("spilled", before)
        spilled += now - before if now >= before else now
        before = now
    if spilled <= 0:
        return ""
    lower = "batch.images_per_task" if max_staleness == 0 else "cluster.max_staleness or batch.images_per_task"
    return f"the object store spilled {size(spilled)} to disk: lower {lower}, or give it more (cluster.object_store_mb)"


def advice(run: RunFolder) -> list[str]:
    """What the run's result says, and what its rows say, each once."""
    said = run.result.get("advice")
    sentences = [str(sentence) for sentence in said] if isinstance(said, list) else []
    staleness = mapping(run.config.get("cluster")).get("max_staleness")
    sentences.append(store_advice(run.rounds, staleness if isinstance(staleness, int) else None))
    return [sentence for sentence in dict.fromkeys(sentences) if sentence]
