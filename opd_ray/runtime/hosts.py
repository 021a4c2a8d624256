"""What a worker process holds: a plain actor, whose tensors are packed on the way out and unpacked on the way in.

Every method returns its bulk results as flat arrays and a small ``Done`` last. Bulk arguments come last too.
"""

import math
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_ray.actors import RolloutActor, SampleRequest, TeacherActor
from opd_ray.actors.recorded import RecordedActor
from opd_ray.digest import Checksum, Digest
from opd_ray.errors import BadInputError, StaleWeightsError
from opd_ray.learners import Learner, LearnerState, UpdateReport
from opd_ray.models.base import Family
from opd_ray.models.precision import NAMES
from opd_ray.runtime.handle import Done, RankFacts, Weights
from opd_ray.storage import checkpoint
from opd_ray.storage.packing import (
    BUCKET,
    AnswerRecord,
    Flat,
    Manifest,
    TrajectoryRecord,
    bind_into,
    buckets,
    join_answers,
    join_trajectories,
    manifest_of,
    pack,
    pack_answer,
    pack_files,
    pack_trajectory,
    pack_whole,
    unpack,
    unpack_answer,
    unpack_files,
    unpack_trajectory,
)
from opd_ray.storage.pictures import write_png
from opd_ray.types import Experience, Scored, TeacherAnswer, Trajectory, WeightVersion, WorkItem

__all__ = ["Drawn", "LearnerHost", "RecordedHost", "RolloutHost", "Share", "TeacherHost"]


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
    remarks: Mapping[str, "array[float]"] = field(default_factory=dict)


class RolloutHost:
    """Draws; proves the weights it draws with."""

    def __init__(self, make: Callable[[], RolloutActor]) -> None:
        self.actor = make()
        self._probed = False

    def ready(self) -> Done:
        """What it computes in."""
        return Done(NAMES[self.actor.family.dtype], 0.0, 0)

    def bind(self, weights: Weights, *flats: Flat) -> Done:
        """Take weights and acknowledge what was read back; the first time, also match the learner's probe."""
        clock = _Clock(None)  # probes are no work
        manifests = [manifest_of(flat) for flat in flats]
        parts = [flat[: manifest.nbytes] for flat, manifest in zip(flats, manifests, strict=True)]

        def write(parameters: Mapping[str, Tensor]) -> None:
            bind_into(parameters, parts, [manifest.without("probe") for manifest in manifests])

        ack = self.actor.bind(write, weights.version, weights.sha256, weights.checksum)
        if not self._probed:
            own, probe = self.actor.probe(), unpack(parts[-1], manifests[-1].only("probe"))["probe"]
            apart, allowed = float((own.cpu() - probe).abs().max()), self.actor.policy.probe_tolerance
            if not apart <= allowed * float(probe.abs().max()):
                self.actor.bound = None  # bound, but not proven
                raise StaleWeightsError(
                    f"the probe of weights {weights.version} differs from the learner's by up to {apart:.3g}: "
                    "base model or adapter differ"
                )
            self._probed = True
        return clock.done(ack)

    def draw(
        self,
        item: WorkItem,
        version: WeightVersion,
        sha256: str,
        last: int,
        images: bool,
        before: Sequence[TrajectoryRecord] = (),
        *flats: Flat,
    ) -> tuple[Flat, Flat, Done]:
        """A trajectory up to a state, its pictures (empty unless asked for), and their record.

        Where another part comes ``before``: the states after that.
        """
        clock = _Clock(self.actor.family)
        begun = _part(before, flats, "drawn on", [self.actor.family]) if before else None
        trajectory = self.actor.draw(item, version, sha256, last=last, before=begun)
        flat, record = pack_trajectory(trajectory)
        pictures, manifest = pack({"images": self.actor.decode(trajectory)} if images else {})
        remarks = self.actor.remarks(trajectory) if images else {}
        return flat, pictures, clock.done(Drawn(record, manifest if images else None, remarks))

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

    def score(self, records: Sequence[TrajectoryRecord], teacher: str, *flats: Flat) -> tuple[Flat, Done]:
        """The teacher's velocities on a trajectory, or on a part of it, before which comes the first part then.

        The record also says which teachers are loaded now, and the seconds that this took.
        """
        clock, loading = _Clock(self.actor), self.actor.loading
        trajectory = _part(records, flats, f"marked by {teacher}", self.actor.families.values())
        answer, answer_record = pack_answer(self.actor.score(trajectory, teacher))
        done = clock.done(answer_record)
        return answer, replace(done, holds=self.actor.loaded, loading=self.actor.loading - loading)


@dataclass(frozen=True, slots=True)
class Share:
    """The records of one work item's experience; its arrays travel beside, in this order where they exist."""

    item: WorkItem
    trajectory: tuple[TrajectoryRecord, ...] = ()
    """Of each part in which it was drawn."""
    answer: tuple[AnswerRecord, ...] = ()
    """Of each part that has trained steps."""
    recorded: Manifest | None = None
    scores: Scored | None = None
    remarks: Mapping[str, "array[float]"] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Sequence[float]]:
        """Scores by reward, infinity where one failed; and what its drawing told, by name."""
        if self.scores is None:
            return dict(self.remarks)
        found = {name: [*scores] for name, scores in self.scores.scores.items()}
        for name, errors in self.scores.errors.items():
            for place in errors:
                found[name][place] = math.inf
        return {**found, **self.remarks}

    def unpack(self, flats: list[Flat], reader: Family | None = None) -> Experience:
        """Experience from the next arrays of ``flats``, which are removed.

        Raises:
            BadInputError: ``reader`` cannot train on one of them.
        """
        path = [unpack_trajectory(flats.pop(0), record) for record in self.trajectory]
        marks = [unpack_answer(flats.pop(0), record) for record in self.answer]
        if reader is not None and path:
            _check(self.item, path, marks, reader)
        return Experience(
            self.item,
            join_trajectories(path) if path else None,
            join_answers(marks) if marks else None,
            scores_of(self.item, {name: told for name, told in self.told.items() if name not in self.remarks}),
            unpack(flats.pop(0), self.recorded) if self.recorded else {},
        )


def scores_of(item: WorkItem, scores: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Reward -> [B], or [B, K] where K pictures of each image were scored."""
    found = {name: torch.tensor(score).reshape(len(item.prompts), -1) for name, score in scores.items()}
    return {name: one.squeeze(1) if one.shape[1] == 1 else one for name, one in found.items()}


class LearnerHost:
    """One learner rank."""

    def __init__(self, make: Callable[[], Learner], bucket: int = BUCKET) -> None:
        self.learner = make()
        self._bucket = bucket
        self._identity = Digest(), Checksum(0)

    def ready(self) -> Done:
        """What it computes in, and in how many arrays it publishes."""
        return Done(RankFacts(NAMES[self.learner.family.dtype], len(self._buckets)), 0.0, 0)

    def begin(self, items: Sequence[WorkItem]) -> Done:
        """A round of these items begins, or begins once more."""
        self.learner.begin(items)
        return Done(None, 0.0, 0)

    def take(self, share: Share, *flats: Flat) -> Done:
        """This rank's next item; a streaming algorithm's gradient accumulates now."""
        clock = _Clock(self.learner.family)
        self.learner.take(share.unpack(list(flats), self.learner.family))
        return clock.done(None)

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Sequence[float]]]]) -> Done:
        """Every item's scores, once a round."""
        self.learner.observe([(item, scores_of(item, of_item)) for item, of_item in scores])
        return Done(None, 0.0, 0)

    def update(self, update: int) -> Done:
        """One optimizer step."""
        clock = _Clock(self.learner.family)
        report: UpdateReport = self.learner.update(update)
        return clock.done(report)

    def finish_round(self, round: int) -> Done:
        """Extra adapters follow; the round's inputs are let go."""
        self.learner.finish_round(round)
        return Done(None, 0.0, 0)

    def publish(self, version: WeightVersion, average: bool, bucket: int) -> tuple[Flat, Done]:
        """One bucket of the weights, in their order; with the last come the probe that proves them, and the record.

        Ranks other than the first take part in gathering them, and give nothing.
        """
        clock, layout = _Clock(None), self._buckets
        first, last = bucket == 0, bucket == len(layout) - 1
        if first:
            self._identity = Digest(), Checksum(max(one.nbytes for part in layout for one in part.values()))
        tensors = self.learner.collect(self.learner.gather(layout[bucket], average=average))
        probe = {"probe": self.learner.probe(average=average)} if last else {}
        if self.learner.engine.rank > 0:
            return pack_whole({}), clock.done(None)
        sha256, checksum = self._identity
        for name, tensor in tensors.items():  # of the weights themselves: packing is proven too
            sha256.add(name, tensor)
            checksum.add(name, tensor)
        record = Weights(version, sha256.hex(), (), checksum.hex()) if last else None
        return pack_whole(tensors | probe), clock.done(record)

    @cached_property
    def _buckets(self) -> list[dict[str, Tensor]]:
        """The same all the run long."""
        return buckets(self.learner.layout(), self._bucket)

    def save(self, run_dir: str, round: int, driver: Mapping[str, Any], attempt: int, keep: int) -> Done:
        """Write a checkpoint of the learner's state and the driver's: its path. The first rank writes."""
        clock, saved = _Clock(None), self._checkpoint(round, driver)
        if saved is None:
            return clock.done(None)
        return clock.done(str(checkpoint.save(Path(run_dir), saved, attempt=attempt, keep=keep)))

    def serialise(self, round: int, driver: Mapping[str, Any]) -> tuple[Flat, Done]:
        """What ``save`` writes, for a worker that sees the run folder. The first rank gives it."""
        clock, saved = _Clock(None), self._checkpoint(round, driver)
        return pack_files(checkpoint.serialise(saved) if saved is not None else {}), clock.done(None)

    def _checkpoint(self, round: int, driver: Mapping[str, Any]) -> checkpoint.Checkpoint | None:
        """Gathered by all ranks, for the first one."""
        state = self.learner.state()
        if self.learner.engine.rank > 0:
            return None
        return checkpoint.Checkpoint(round, state.tensors, {"learner": state.values, "driver": dict(driver)})

    def take_back(self, flat: Flat) -> Done:
        """Load a checkpoint that ``serialise`` gave: the driver's state; None where there was none."""
        contents = unpack_files(flat)
        if not contents:
            return Done(None, 0.0, 0)
        return Done(self._load(checkpoint.deserialise(contents)), 0.0, 0)

    def exported(self) -> tuple[Flat, Done]:
        """The files of ``export``. The first rank gives them."""
        with tempfile.TemporaryDirectory() as scratch:
            self.learner.export(Path(scratch))
            files = {str(path.relative_to(scratch)): path for path in Path(scratch).rglob("*") if path.is_file()}
            return pack_files({name: path.read_bytes() for name, path in sorted(files.items())}), Done(None, 0.0, 0)

    def restore(self, run_dir: str) -> Done:
        """Load the newest valid checkpoint; its round, the driver's state, and notes about damaged ones."""
        saved, notes = checkpoint.newest(Path(run_dir))
        if saved is None:
            return Done((0, None, notes), 0.0, 0)
        return Done((saved.round, self._load(saved), notes), 0.0, 0)

    def _load(self, saved: checkpoint.Checkpoint) -> Any:
        """Go on from there; the driver's state."""
        self.learner.load_state(LearnerState(saved.tensors, saved.state["learner"]))
        return saved.state["driver"]

    def hashes(self) -> Done:
        """Identity of the raw and the averaged student."""
        return Done(self.learner.hashes(), 0.0, 0)

    def export(self, folder: str) -> Done:
        """Write what users load."""
        self.learner.export(Path(folder))
        return Done(None, 0.0, 0)


def _part(
    records: Sequence[TrajectoryRecord], flats: Sequence[Flat], what: str, readers: Collection[Family]
) -> Trajectory:
    """The last of these parts of a trajectory, with the conditioning of the first.

    Raises:
        BadInputError: its latents are not finite, or of a shape that none of its readers has.
    """
    parts = [unpack_trajectory(flat, record) for flat, record in zip(flats, records, strict=True)]
    part = replace(parts[-1], cond=parts[0].cond, uncond=parts[0].uncond)
    _check_path(part, what, readers)
    return part


def _check_path(path: Trajectory, what: str, readers: Collection[Family], part: int | None = None) -> None:
    seen, shapes = tuple(path.latents.shape[2:]), {family.latent_shape for family in readers}
    if shapes and seen not in shapes:
        allowed = " or ".join(map(str, sorted(shapes)))
        raise BadInputError("trajectory", f"latents {seen} of {path.item}, to be {what}, expected {allowed}", part)
    if not path.latents.isfinite().all():
        raise BadInputError("trajectory", f"NaN or infinity in the latents of {path.item}, to be {what}", part)


def _check(item: WorkItem, path: Sequence[Trajectory], marks: Sequence[TeacherAnswer], reader: Family) -> None:
    """What a learner rank is given can be trained on.

    Raises:
        BadInputError: a part of the trajectory or of the answer is not finite, or of another shape than it has to be.
    """
    for number, part in enumerate(path):
        _check_path(part, "trained on", [reader], number)
    steps = tuple(step for mark in marks for step in mark.steps)
    if marks and steps != item.steps:
        raise BadInputError("answer", f"{marks[0].teacher} answered {item} at steps {steps}, expected {item.steps}")
    rows, _, *latent = path[0].latents.shape
    for number, mark in enumerate(marks):
        seen, expected = list(mark.velocity.shape), [rows, len(mark.steps), *latent]
        if seen != expected:
            raise BadInputError("answer", f"{mark.teacher} answered {item} with {seen}, expected {expected}", number)
        if not mark.velocity.isfinite().all():
            raise BadInputError("answer", f"NaN or infinity in what {mark.teacher} answered to {item}", number)
