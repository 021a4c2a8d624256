"""What a worker process holds: a plain actor, whose tensors are packed on the way out and unpacked on the way in.

Every method returns its bulk results as flat arrays and a small ``Done`` last. Bulk arguments come last too.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ray.actors import RewardActor, RolloutActor, SampleRequest, TeacherActor
from opd_ray.actors.recorded import RecordedActor
from opd_ray.digest import digest
from opd_ray.errors import StaleWeightsError
from opd_ray.learners import Learner, LearnerState, UpdateReport
from opd_ray.models.base import Family
from opd_ray.models.precision import NAMES
from opd_ray.runtime.handle import Done, Weights
from opd_ray.storage import checkpoint
from opd_ray.storage.packing import (
    AnswerRecord,
    Flat,
    Manifest,
    TrajectoryRecord,
    pack,
    pack_answer,
    pack_trajectory,
    unpack,
    unpack_answer,
    unpack_trajectory,
)
from opd_ray.types import Experience, WeightVersion, WorkItem

__all__ = ["Drawn", "LearnerHost", "RecordedHost", "RewardHost", "RolloutHost", "Share", "TeacherHost"]


class _Clock:
    """Seconds and denoiser rows of one call."""

    def __init__(self, counter: Family | TeacherActor | None) -> None:
        self._counter, self._start = counter, time.perf_counter()
        self._rows = counter.forwards if counter else 0

    def done(self, value: Any) -> Done:
        rows = self._counter.forwards - self._rows if self._counter else 0
        return Done(value, time.perf_counter() - self._start, rows)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The record of a draw."""

    trajectory: TrajectoryRecord
    images: Manifest | None


class RolloutHost:
    """Draws; proves the weights it draws with."""

    def __init__(self, make: Callable[[], RolloutActor]) -> None:
        self.actor = make()
        self._probed = False

    def ready(self) -> Done:
        """What it computes in."""
        return Done(NAMES[self.actor.family.dtype], 0.0, 0)

    def bind(self, weights: Weights, flat: Flat) -> Done:
        """Take weights and acknowledge what was read back; the first time, also match the learner's probe."""
        clock = _Clock(None)  # probes are no work
        tensors = unpack(flat, weights.manifest)
        probe = tensors.pop("probe")
        ack = self.actor.bind(tensors, weights.version, weights.sha256)
        if not self._probed:
            own = self.actor.probe()
            apart, allowed = float((own.cpu() - probe).abs().max()), self.actor.policy.probe_tolerance
            if not apart <= allowed * float(probe.abs().max()):
                raise StaleWeightsError(
                    f"the probe of weights {weights.version} differs from the learner's by up to {apart:.3g}: "
                    "base model or adapter differ"
                )
            self._probed = True
        return clock.done(ack)

    def draw(
        self, item: WorkItem, version: WeightVersion, sha256: str, whole: bool, images: bool
    ) -> tuple[Flat, Flat, Done]:
        """A trajectory, its pictures (empty unless asked for), and their record."""
        clock = _Clock(self.actor.family)
        trajectory = self.actor.draw(item, version, sha256, whole=whole or images)
        flat, record = pack_trajectory(trajectory)
        pictures, manifest = pack({"images": self.actor.decode(trajectory)} if images else {})
        return flat, pictures, clock.done(Drawn(record, manifest if images else None))

    def sample(self, request: SampleRequest, files: Sequence[str]) -> tuple[Flat, Done]:
        """Pictures of any model of the run; the first of them are also written to PNG files."""
        clock = _Clock(self.actor.family)
        images = self.actor.sample(request)
        for file, image in zip(files, images, strict=False):
            write_png(image, Path(file))
        flat, manifest = pack({"images": images})
        return flat, clock.done(manifest)


class RecordedHost:
    """Reads recorded experience."""

    def __init__(self, make: Callable[[], RecordedActor]) -> None:
        self.actor = make()

    def ready(self) -> Done:
        """Who came up."""
        return Done(os.getpid(), 0.0, 0)

    def read(self, task: str, name: str) -> tuple[Flat, Done]:
        """The tensors of one recording."""
        clock = _Clock(None)
        flat, manifest = pack(self.actor.read(task, name))
        return flat, clock.done(manifest)


class TeacherHost:
    """Marks trajectories."""

    def __init__(self, make: Callable[[], TeacherActor]) -> None:
        self.actor = make()

    def ready(self) -> Done:
        """The facts of its teachers, and which of them are loaded."""
        return Done(self.actor.facts, 0.0, 0, holds=self.actor.loaded)

    def score(self, record: TrajectoryRecord, teacher: str, flat: Flat) -> tuple[Flat, Done]:
        """The teacher's velocities on a trajectory; which teachers are loaded now, and the seconds that this took."""
        clock, loading = _Clock(self.actor), self.actor.loading
        answer, answer_record = pack_answer(self.actor.score(unpack_trajectory(flat, record), teacher))
        done = clock.done(answer_record)
        return answer, replace(done, holds=self.actor.loaded, loading=self.actor.loading - loading)


class RewardHost:
    """Scores pictures."""

    def __init__(self, make: Callable[[], RewardActor]) -> None:
        self.actor = make()

    def ready(self) -> Done:
        """The rewards it holds."""
        return Done(sorted(self.actor.rewards), 0.0, 0)

    def score(self, prompts: Sequence[str], manifest: Manifest, flat: Flat) -> Done:
        """Reward -> one number a picture, small enough to travel as a record."""
        clock = _Clock(None)
        scores = self.actor.score(unpack(flat, manifest)["images"], prompts)
        return clock.done({name: score.tolist() for name, score in scores.items()})


@dataclass(frozen=True, slots=True)
class Share:
    """The records of one work item's experience; its arrays travel beside, in this order where they exist."""

    item: WorkItem
    trajectory: TrajectoryRecord | None = None
    answer: AnswerRecord | None = None
    recorded: Manifest | None = None
    scores: Mapping[str, Sequence[float]] | None = None

    def unpack(self, flats: list[Flat]) -> Experience:
        """Experience from the next arrays of ``flats``, which are removed."""
        return Experience(
            self.item,
            unpack_trajectory(flats.pop(0), self.trajectory) if self.trajectory else None,
            unpack_answer(flats.pop(0), self.answer) if self.answer else None,
            {name: torch.tensor(score) for name, score in (self.scores or {}).items()},
            unpack(flats.pop(0), self.recorded) if self.recorded else {},
        )


class LearnerHost:
    """One learner rank."""

    def __init__(self, make: Callable[[], Learner]) -> None:
        self.learner = make()

    def ready(self) -> Done:
        """What it computes in."""
        return Done(NAMES[self.learner.family.dtype], 0.0, 0)

    def stage(self, items: Sequence[WorkItem], scores: Sequence[Any], shares: Sequence[Share], *flats: Flat) -> Done:
        """Take this rank's share of a round; nothing is trained yet."""
        clock, arrays = _Clock(None), list(flats)
        experience = [share.unpack(arrays) for share in shares]
        named = [
            (item, {name: torch.tensor(score) for name, score in of_item.items()})
            for item, of_item in zip(items, scores, strict=True)
        ]
        self.learner.stage(items, experience, named)
        return clock.done(None)

    def update(self, update: int) -> Done:
        """One optimizer step."""
        clock = _Clock(self.learner.family)
        report: UpdateReport = self.learner.update(update)
        return clock.done(report)

    def finish_round(self, round: int) -> Done:
        """Extra adapters follow; the round's inputs are let go."""
        self.learner.finish_round(round)
        return Done(None, 0.0, 0)

    def publish(self, version: WeightVersion, average: bool) -> tuple[Flat, Done]:
        """The weights and the probe that proves them, as one array; the record lacks only the reference."""
        clock = _Clock(None)
        weights = self.learner.weights(average=average)
        tensors: dict[str, Tensor] = {**weights, "probe": self.learner.probe(average=average)}
        flat, manifest = pack(tensors)
        return flat, clock.done(Weights(version, digest(weights), manifest, None))

    def save(self, run_dir: str, round: int, driver: Mapping[str, Any], attempt: int, keep: int) -> Done:
        """Write a checkpoint of this rank's state and the driver's; ranks are alike, so one writes."""
        clock, state = _Clock(None), self.learner.state()
        saved = checkpoint.Checkpoint(round, state.tensors, {"learner": state.values, "driver": dict(driver)})
        return clock.done(str(checkpoint.save(Path(run_dir), saved, attempt=attempt, keep=keep)))

    def restore(self, run_dir: str) -> Done:
        """Load the newest valid checkpoint; its round, the driver's state, and notes about damaged ones."""
        saved, notes = checkpoint.newest(Path(run_dir))
        if saved is None:
            return Done((0, None, notes), 0.0, 0)
        self.learner.load_state(LearnerState(saved.tensors, saved.state["learner"]))
        return Done((saved.round, saved.state["driver"], notes), 0.0, 0)

    def hashes(self) -> Done:
        """Identity of the raw and the averaged student."""
        return Done(self.learner.hashes(), 0.0, 0)

    def export(self, folder: str) -> Done:
        """Write the LoRA that users load."""
        self.learner.export(Path(folder))
        return Done(None, 0.0, 0)


def write_png(image: Tensor, path: Path) -> None:
    """One picture [3, H, W] in [0, 1]."""
    from PIL import Image  # a worker that writes no pictures does not import it

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
