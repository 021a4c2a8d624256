"""Named tensors as one flat uint8 array plus a manifest, and back. Unpacking always copies.

An array from Ray's object store is read-only, and yet ``torch.from_numpy(array).add_(1)`` writes
through to every other reader without an error. So this is the only module that makes tensors from
stored bytes. One flat array is also an order of magnitude faster to store than a dict of tensors.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.digest import as_bytes
from opd_ray.digest import digest as content_digest
from opd_ray.types import TeacherAnswer, Trajectory, WeightVersion, WorkItem

__all__ = [
    "AnswerRecord",
    "Entry",
    "Flat",
    "Manifest",
    "TrajectoryRecord",
    "join_answers",
    "join_trajectories",
    "pack",
    "pack_answer",
    "pack_trajectory",
    "pack_whole",
    "unpack",
    "unpack_answer",
    "unpack_trajectory",
    "unpack_whole",
]

Flat = npt.NDArray[np.uint8]
ALIGNMENT = 64
LENGTH = 8
"""Bytes of a number at the end of an array."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in the flat array; offset and size in bytes."""

    name: str
    dtype: str
    """Without the prefix, for instance ``bfloat16``."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a flat array holds, in the order of the mapping that was packed."""

    entries: tuple[Entry, ...]
    nbytes: int
    """Size of the whole array, padding included."""
    sha256: str | None = None
    """``opd_ray.digest`` of the tensors, where it was asked for; ``unpack`` then checks it."""


@dataclass(frozen=True, slots=True)
class TrajectoryRecord:
    """A trajectory without its tensors: small enough for the driver."""

    item: WorkItem
    weights: WeightVersion
    manifest: Manifest
    first: int = 0


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """A teacher's answer without its tensor."""

    teacher: str
    steps: tuple[int, ...]
    manifest: Manifest


def pack(tensors: Mapping[str, Tensor], *, digest: bool = False) -> tuple[Flat, Manifest]:
    """Copy tensors of any device, dtype and stride into one new array; gradients are left behind.

    Args:
        tensors: by name; empty and 0-d ones too.
        digest: also hash the content, about a second for each GB.
    """
    manifest = _laid_out(tensors)
    flat = np.zeros(manifest.nbytes, dtype=np.uint8)  # zeros: equal tensors give equal bytes, padding included
    _fill(flat, manifest, tensors)
    if digest:  # of what was packed, so that a mistake in packing shows too
        manifest = replace(manifest, sha256=content_digest(unpack(flat, manifest)))
    return flat, manifest


def unpack(flat: Flat, manifest: Manifest) -> dict[str, Tensor]:
    """Fresh CPU tensors; each one is writable, owns its memory and shares nothing with ``flat``.

    Raises:
        ValueError: ``flat`` is not what the manifest describes, in size or (where it has one) hash.
    """
    if flat.dtype != np.uint8 or flat.shape != (manifest.nbytes,):
        raise ValueError(
            f"packed array is {flat.dtype} {flat.shape}, its manifest describes uint8 "
            f"({manifest.nbytes},); array and manifest belong to different objects"
        )
    tensors = {}
    for entry in manifest.entries:
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        if tensor.numel() * tensor.element_size() != entry.nbytes:
            raise ValueError(f"{entry.name}: {entry.nbytes} bytes for {entry.dtype} {entry.shape}")
        as_bytes(tensor).numpy()[:] = _part(flat, entry)
        tensors[entry.name] = tensor
    if manifest.sha256 is not None and (seen := content_digest(tensors)) != manifest.sha256:
        raise ValueError(f"packed array has sha256 {seen}, its manifest says {manifest.sha256}")
    return tensors


def pack_whole(tensors: Mapping[str, Tensor]) -> Flat:
    """One array that says itself what it holds: behind the tensors come the manifest as JSON, and its length.

    For sets of many tensors, whose manifest would be a large record.
    """
    manifest = _laid_out(tensors)
    entries = json.dumps([astuple(entry) for entry in manifest.entries]).encode()
    tail = entries + len(entries).to_bytes(LENGTH, "little")
    flat = np.zeros(manifest.nbytes + len(tail), dtype=np.uint8)
    _fill(flat, manifest, tensors)
    flat[manifest.nbytes :] = np.frombuffer(tail, dtype=np.uint8)
    return flat


def unpack_whole(flat: Flat) -> dict[str, Tensor]:
    """The inverse of ``pack_whole``.

    Raises:
        ValueError: ``flat`` is no such array.
    """
    length = int.from_bytes(flat[-LENGTH:].tobytes(), "little")
    end = len(flat) - LENGTH - length
    if end < 0:
        raise ValueError(f"an array of {len(flat)} bytes has no room for a manifest of {length}")
    entries = json.loads(flat[end : end + length].tobytes())
    found = tuple(Entry(name, dtype, tuple(shape), offset, size) for name, dtype, shape, offset, size in entries)
    return unpack(flat[:end], Manifest(found, end))


def _laid_out(tensors: Mapping[str, Tensor]) -> Manifest:
    """Where each will lie."""
    entries, end = list[Entry](), 0
    for name, tensor in tensors.items():
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.numel() * tensor.element_size()
        entries.append(Entry(name, _dtype_name(tensor), tuple(tensor.shape), offset, nbytes=end - offset))
    return Manifest(tuple(entries), end)


def _fill(flat: Flat, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    target = torch.from_numpy(flat)
    for entry in manifest.entries:
        part = target[entry.offset : entry.offset + entry.nbytes]
        part.copy_(as_bytes(tensors[entry.name]))


def pack_trajectory(trajectory: Trajectory) -> tuple[Flat, TrajectoryRecord]:
    """The tensors of a trajectory as one array, the rest as a record."""
    flat, manifest = pack(
        {
            "sigmas": trajectory.sigmas,
            "latents": trajectory.latents,
            **{f"cond/{name}": tensor for name, tensor in trajectory.cond.items()},
            **{f"uncond/{name}": tensor for name, tensor in trajectory.uncond.items()},
        }
    )
    return flat, TrajectoryRecord(trajectory.item, trajectory.weights, manifest, trajectory.first)


def unpack_trajectory(flat: Flat, record: TrajectoryRecord) -> Trajectory:
    """The inverse of ``pack_trajectory``; raises as ``unpack`` does."""
    tensors = unpack(flat, record.manifest)
    return Trajectory(
        item=record.item,
        weights=record.weights,
        sigmas=tensors["sigmas"],
        latents=tensors["latents"],
        cond=_below(tensors, "cond/"),
        uncond=_below(tensors, "uncond/"),
        first=record.first,
    )


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """The states of all parts; what else there is, the first part has.

    Raises:
        ValueError: they are not the neighbouring parts of one drawing.
    """
    head = parts[0]
    for before, part in itertools.pairwise(parts):
        if (part.item, part.weights, part.first) != (head.item, head.weights, before.last + 1):
            raise ValueError(
                f"{part.item} from state {part.first} on, drawn with {part.weights}, does not follow {before.item} "
                f"up to state {before.last}, drawn with {before.weights}"
            )
    if len(parts) == 1:
        return head
    return replace(head, latents=torch.cat([part.latents for part in parts], dim=1))


def pack_answer(answer: TeacherAnswer) -> tuple[Flat, AnswerRecord]:
    """The velocity of an answer as one array, the rest as a record."""
    flat, manifest = pack({"velocity": answer.velocity})
    return flat, AnswerRecord(answer.teacher, answer.steps, manifest)


def unpack_answer(flat: Flat, record: AnswerRecord) -> TeacherAnswer:
    """The inverse of ``pack_answer``; raises as ``unpack`` does."""
    velocity = unpack(flat, record.manifest)["velocity"]
    return TeacherAnswer(record.teacher, record.steps, velocity)


def join_answers(parts: Sequence[TeacherAnswer]) -> TeacherAnswer:
    """One teacher's velocities at the steps of all parts, in their order.

    Raises:
        ValueError: they are of several teachers, or their steps do not rise.
    """
    steps = tuple(step for part in parts for step in part.steps)
    if len({part.teacher for part in parts}) != 1 or list(steps) != sorted(set(steps)):
        raise ValueError(f"answers of {[part.teacher for part in parts]} at steps {steps} are not one answer")
    if len(parts) == 1:
        return parts[0]
    return TeacherAnswer(parts[0].teacher, steps, torch.cat([part.velocity for part in parts], dim=1))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _part(flat: Flat, entry: Entry) -> Flat:
    return flat[entry.offset : entry.offset + entry.nbytes]
