"""The training loop. Synchronous is staleness 0, not a second loop."""

from collections import deque

from opd_ray.experience import Round
from opd_ray.run import Run

__all__ = ["train"]


def train(run: Run) -> None:
    """All rounds; from the last checkpoint again where a learner rank was lost."""
    while run.round < run.rounds:
        with run.recovering():
            rounds(run)


def rounds(run: Run) -> None:
    """On-policy distillation: the student draws, the teacher marks each step of *that* drawing."""
    weights = run.learner.publish()
    inflight: deque[Round] = deque()

    while run.round < run.rounds:
        while len(inflight) <= run.max_staleness and run.round + len(inflight) < run.rounds:
            inflight.append(run.source.collect(run.round + len(inflight), weights))

        batch = inflight.popleft()
        run.learner.begin(batch.items)
        with run.arrivals(batch) as arrivals:  # trajectories, teachers' velocities, scores
            for one in arrivals:  # references, never a tensor here; later ones are still drawn and marked
                run.learner.take(one)
        updates = [run.learner.update(update) for update in range(run.algorithm.updates_per_round)]
        run.learner.finish_round(batch.number)
        weights = run.learner.publish()

        run.finish_round(batch, updates, weights)  # metrics; a checkpoint and an evaluation when due
