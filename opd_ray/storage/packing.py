"""Named tensors as flat uint8 arrays, each with a manifest, and back. Unpacking always copies.

An array from Ray's object store is read-only, and yet ``torch.from_numpy(array).add_(1)`` writes
through to every other reader without an error. So this is the only module that makes tensors from
stored bytes. One flat array is also an order of magnitude faster to store than a dict of tensors.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.digest import as_bytes
from opd_ray.types import TeacherAnswer, Trajectory, WeightVersion, WorkItem

__all__ = [
    "AnswerRecord",
    "Entry",
    "Flat",
    "Manifest",
    "TrajectoryRecord",
    "bind_into",
    "buckets",
    "join_answers",
    "join_trajectories",
    "manifest_of",
    "pack",
    "pack_answer",
    "pack_files",
    "pack_trajectory",
    "pack_whole",
    "unpack",
    "unpack_answer",
    "unpack_files",
    "unpack_trajectory",
    "unpack_whole",
]

Flat = npt.NDArray[np.uint8]
ALIGNMENT = 64
BUCKET = 256_000_000
"""Bytes of one array of published weights: smaller ones move on while larger models are still being packed."""
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

    def only(self, *names: str) -> "Manifest":
        """The same array, with these tensors alone."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.name in names))

    def without(self, *names: str) -> "Manifest":
        """The same array, with all other tensors."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.name not in names))


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


def pack(tensors: Mapping[str, Tensor]) -> tuple[Flat, Manifest]:
    """Copy tensors of any device, dtype and stride into one new array; gradients are left behind.

    Args:
        tensors: by name; empty and 0-d ones too.
    """
    manifest = _laid_out(tensors)
    flat = np.zeros(manifest.nbytes, dtype=np.uint8)  # zeros: equal tensors give equal bytes, padding included
    _fill(flat, manifest, tensors)
    return flat, manifest


def buckets(tensors: Mapping[str, Tensor], size: int = BUCKET) -> list[dict[str, Tensor]]:
    """Neighbouring tensors, together no larger than ``size`` bytes; a larger one has a bucket of its own."""
    found: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not found or tensor.nbytes > room:
            found.append({})
            room = size
        found[-1][name] = tensor
        room -= tensor.nbytes
    return found or [{}]


def unpack(flat: Flat, manifest: Manifest) -> dict[str, Tensor]:
    """Fresh CPU tensors; each one is writable, owns its memory and shares nothing with ``flat``.

    Raises:
        ValueError: ``flat`` is not what the manifest describes.
    """
    _require_described(flat, manifest)
    return {entry.name: _fresh(flat, entry) for entry in manifest.entries}


@torch.no_grad()
def bind_into(parameters: Mapping[str, Tensor], flats: Iterable[Flat], manifests: Sequence[Manifest]) -> None:
    """Copy stored bytes straight into parameters that are there: one copy on the CPU, and nothing keeps the bytes.

    Args:
        parameters: of any device and stride; written in place.
        flats: the arrays, each of which may be let go before the next is asked for.
        manifests: one of each array; together they have to describe exactly the parameters.

    Raises:
        ValueError: names, shapes or number formats differ, before anything is written; or an array is not what its
            manifest describes.
    """
    sent = [entry for manifest in manifests for entry in manifest.entries]
    _require_same({name: (_dtype_name(p), tuple(p.shape)) for name, p in parameters.items()}, sent)
    for flat, manifest in zip(flats, manifests, strict=True):
        _require_described(flat, manifest)
        for entry in manifest.entries:
            parameter = parameters[entry.name].detach()
            if parameter.is_cpu and parameter.is_contiguous():
                np.copyto(as_bytes(parameter).numpy(), _part(flat, entry))  # its bytes are a view then
            else:
                parameter.copy_(_fresh(flat, entry))


def _require_same(own: Mapping[str, tuple[str, tuple[int, ...]]], sent: Sequence[Entry]) -> None:
    theirs = {entry.name: (entry.dtype, entry.shape) for entry in sent}
    if len(theirs) != len(sent):
        raise ValueError("a tensor was sent twice")
    if own != theirs:
        name = min(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        seen, here = (" ".join(map(str, side[name])) if name in side else "missing" for side in (theirs, own))
        raise ValueError(f"{name} is {seen}, here {here}")


def _require_described(flat: Flat, manifest: Manifest) -> None:
    if flat.dtype != np.uint8 or flat.shape != (manifest.nbytes,):
        raise ValueError(
            f"packed array is {flat.dtype} {flat.shape}, its manifest describes uint8 "
            f"({manifest.nbytes},); array and manifest belong to different objects"
        )
    for entry in manifest.entries:
        if math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize != entry.nbytes:
            raise ValueError(f"{entry.name}: {entry.nbytes} bytes for {entry.dtype} {entry.shape}")


def _fresh(flat: Flat, entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    as_bytes(tensor).numpy()[:] = _part(flat, entry)
    return tensor


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


def pack_files(contents: Mapping[str, bytes]) -> Flat:
    """Files by name as one array that says itself what it holds."""
    return pack_whole(
        {
            name: torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)[: len(content)]
            for name, content in contents.items()
        }
    )


def unpack_files(flat: Flat) -> dict[str, bytes]:
    """The inverse of ``pack_files``; raises as ``manifest_of`` does."""
    return {entry.name: _part(flat, entry).tobytes() for entry in manifest_of(flat).entries}


def manifest_of(flat: Flat) -> Manifest:
    """What an array of ``pack_whole`` says that it holds in its first ``nbytes``.

    Raises:
        ValueError: ``flat`` is no such array.
    """
    length = int.from_bytes(flat[-LENGTH:].tobytes(), "little")
    end = len(flat) - LENGTH - length
    if end < 0:
        raise ValueError(f"an array of {len(flat)} bytes has no room for a manifest of {length}")
    entries = json.loads(flat[end : end + length].tobytes())
    found = tuple(Entry(name, dtype, tuple(shape), offset, size) for name, dtype, shape, offset, size in entries)
    return Manifest(found, end)


def unpack_whole(flat: Flat) -> dict[str, Tensor]:
    """The inverse of ``pack_whole``; raises as ``manifest_of`` and ``unpack`` do."""
    manifest = manifest_of(flat)
    return unpack(flat[: manifest.nbytes], manifest)


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
            **({} if trajectory.velocities is None else {"velocities": trajectory.velocities}),
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
        velocities=tensors.get("velocities"),
    )


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """The states and velocities of all parts; what else there is, the first part has.

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
    drawn = [part.velocities for part in parts if part.velocities is not None]
    velocities = torch.cat(drawn, dim=1) if drawn else None
    return replace(head, latents=torch.cat([part.latents for part in parts], dim=1), velocities=velocities)


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
