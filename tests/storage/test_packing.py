"""Packing: any tensors survive, bit for bit, and nothing that is unpacked shares memory."""

import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.digest import checksum, digest
from opd_ray.storage import packing
from opd_ray.types import Experience, Prompt, TeacherAnswer, Trajectory, WeightVersion, WorkItem

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@st.composite
def tensors(draw):
    """Random bits (NaN payloads and -0.0 among them) in any shape, transposed or strided."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    content = torch.tensor(list(data), dtype=torch.uint8).view(dtype).reshape(shape)
    if not shape:
        return content
    return draw(st.sampled_from([content, content.transpose(0, -1), content[..., ::2]]))


named = st.dictionaries(st.text(max_size=8), tensors(), max_size=5)


def dense(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def content(tensor):
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        dense(tensor).reshape(-1).view(torch.uint8).tolist(),
    )


def frozen(packed):
    """As the object store hands an array out."""
    flat, manifest = packed
    flat.setflags(write=False)
    return flat, manifest


@settings(max_examples=200, deadline=None)
@given(named)
def test_any_tensors_survive_bit_for_bit(original):
    flat, manifest = frozen(packing.pack(original))
    result = packing.unpack(flat, manifest)
    assert list(result) == list(original)
    assert {k: content(v) for k, v in result.items()} == {k: content(v) for k, v in original.items()}
    assert flat.dtype == np.uint8 and flat.shape == (manifest.nbytes,)
    assert all(entry.offset % 64 == 0 for entry in manifest.entries)


@settings(max_examples=100, deadline=None)
@given(named)
def test_an_array_that_says_itself_what_it_holds_survives_bit_for_bit(original):
    flat = packing.pack_whole(original)
    flat.setflags(write=False)
    result = packing.unpack_whole(flat)
    assert list(result) == list(original)
    assert {k: content(v) for k, v in result.items()} == {k: content(v) for k, v in original.items()}
    packed, manifest = packing.pack(original)
    assert (flat[: manifest.nbytes] == packed).all()


def test_an_array_that_does_not_say_what_it_holds_is_refused():
    with pytest.raises(ValueError, match="an array of 16 bytes has no room for a manifest of"):
        packing.unpack_whole(np.ones(16, np.uint8))


@settings(max_examples=100, deadline=None)
@given(named)
def test_entries_do_not_overlap_and_equal_tensors_give_equal_bytes(original):
    flat, manifest = packing.pack(original)
    again, _ = packing.pack({name: tensor.clone() for name, tensor in original.items()})
    assert flat.tobytes() == again.tobytes()
    end = 0
    for entry in manifest.entries:
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    assert end == manifest.nbytes


def test_unpacked_tensors_share_memory_with_nothing():
    """``torch.from_numpy`` on a read-only array would write through it without an error."""
    flat, manifest = frozen(packing.pack({"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.tensor(1.0)}))
    before = flat.tobytes()
    first, second = packing.unpack(flat, manifest), packing.unpack(flat, manifest)
    for tensor in first.values():
        tensor.add_(1)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert flat.tobytes() == before
    assert all(tensor.eq(1).all() for tensor in second.values())
    assert all(tensor.eq(2).all() for tensor in first.values())


def test_the_packed_array_shares_memory_with_no_tensor():
    source = torch.ones(4)
    flat, manifest = packing.pack({"a": source})
    source.zero_()
    assert packing.unpack(flat, manifest)["a"].tolist() == [1, 1, 1, 1]


def test_gradients_are_left_behind():
    weight = torch.nn.Parameter(torch.ones(2))
    result = packing.unpack(*packing.pack({"w": weight, "twice": weight * 2}))
    assert not any(tensor.requires_grad for tensor in result.values())


def test_an_array_that_is_not_the_manifests_is_refused():
    flat, manifest = packing.pack({"a": torch.ones(4)})
    with pytest.raises(ValueError, match=r"uint8 \(12,\), its manifest describes uint8 \(16,\)"):
        packing.unpack(flat[:12], manifest)
    with pytest.raises(ValueError, match="its manifest describes"):
        packing.unpack(np.zeros(17, np.uint8), manifest)
    with pytest.raises(ValueError, match="float32"):
        packing.unpack(np.zeros(16, np.float32), manifest)
    entry = dataclasses.replace(manifest.entries[0], shape=(2, 3))
    with pytest.raises(ValueError, match="a: 16 bytes for float32"):
        packing.unpack(flat, dataclasses.replace(manifest, entries=(entry,)))


@pytest.mark.parametrize("digest", [digest, checksum])
def test_digest_and_checksum_know_names_dtypes_shapes_and_bits_but_no_order(digest):
    a, b = torch.arange(6.0), torch.ones(2)
    base = digest({"a": a, "b": b})
    assert base == digest({"b": b, "a": a}) and len(base) == 64
    others = [
        {"a": b, "b": a},
        {"a": a},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a, "b": torch.tensor([1.0, 1.0000001])},
        {"a": -a, "b": b},
        {},
    ]
    assert len({base, *map(digest, others)}) == len(others) + 1
    assert digest({"a": torch.tensor(0.0)}) != digest({"a": torch.tensor(-0.0)})
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert digest({"a": transposed}) == digest({"a": transposed.contiguous()})


def item():
    prompts = tuple(Prompt(f"p{i}", f"a cat, {i}", "text") for i in range(2))
    return WorkItem(3, "text", 1, 4, prompts, samples=(0, 1), steps=(0, 2))


@pytest.mark.parametrize("uncond", [{}, {"embeds": torch.ones(1, 5, 3, dtype=torch.bfloat16)}])
def test_a_trajectory_survives(uncond):
    trajectory = Trajectory(
        item(),
        WeightVersion(1, 2, 3),
        sigmas=torch.linspace(1, 0, 4),
        latents=torch.randn(2, 4, 3, 2, 2),
        cond={"embeds": torch.randn(2, 5, 3).bfloat16(), "cond/pooled": torch.randn(2, 3)},
        uncond=uncond,
    )
    flat, record = packing.pack_trajectory(trajectory)
    flat.setflags(write=False)
    result = packing.unpack_trajectory(flat, record)
    assert (result.item, result.weights) == (trajectory.item, trajectory.weights)
    assert torch.equal(result.sigmas, trajectory.sigmas)
    assert torch.equal(result.latents, trajectory.latents)
    for name in ("cond", "uncond"):
        before, after = getattr(trajectory, name), getattr(result, name)
        assert list(after) == list(before)
        assert all(after[key].equal(before[key]) for key in before)


def test_an_answer_survives():
    answer = TeacherAnswer("counts", (0, 2), torch.randn(2, 2, 3, 2, 2))
    result = packing.unpack_answer(*packing.pack_answer(answer))
    assert (result.teacher, result.steps) == ("counts", (0, 2))
    assert torch.equal(result.velocity, answer.velocity)


def parts_of(*bounds):
    """A drawing of four states, and the same in parts."""
    latents, cond = torch.randn(2, 4, 3, 2, 2), {"e": torch.randn(2, 5)}
    common = item(), WeightVersion(1, 2, 3), torch.linspace(1, 0, 4)
    parts = [
        Trajectory(*common, latents[:, first:end], {} if first else cond, {}, first)
        for first, end in itertools.pairwise((0, *bounds, 4))
    ]
    return Trajectory(*common, latents, cond, {}), parts


@pytest.mark.parametrize("bounds", [(), (1,), (2, 3)])
def test_parts_of_a_trajectory_that_were_packed_join_to_the_whole(bounds):
    whole, parts = parts_of(*bounds)
    joined = packing.join_trajectories([packing.unpack_trajectory(*packing.pack_trajectory(part)) for part in parts])
    assert (joined.item, joined.weights, joined.first, joined.last) == (whole.item, whole.weights, 0, 3)
    assert torch.equal(joined.latents, whole.latents) and torch.equal(joined.cond["e"], whole.cond["e"])
    assert all(torch.equal(part.state(part.last), whole.state(part.last)) for part in parts)
    with pytest.raises(IndexError, match=r"round 3 text\[1\] has states 0 to 3 here, not 4"):
        whole.state(4)


def test_parts_that_are_not_neighbours_of_one_drawing_do_not_join():
    _, parts = parts_of(1, 2)
    newer = replace(parts[1], weights=WeightVersion(1, 2, 4))
    for wrong in ([parts[0], parts[2]], [parts[1], parts[0]], [parts[0], newer]):
        with pytest.raises(ValueError, match="does not follow"):
            packing.join_trajectories(wrong)


def test_a_trajectory_that_ends_before_a_trained_step_is_no_experience():
    _, parts = parts_of(2)
    for part in parts:
        with pytest.raises(ValueError, match=r"has states \d to \d, expected 0 to 2 at least"):
            Experience(part.item, part)
    with pytest.raises(ValueError, match="from state 3 on, expected 2 rows of 1 to 1 states"):
        replace(parts[1], first=3)


def test_answers_to_parts_join_in_step_order():
    velocity = torch.randn(2, 3, 3, 2, 2)
    parts = [TeacherAnswer("t", (0, 2), velocity[:, :2]), TeacherAnswer("t", (3,), velocity[:, 2:])]
    joined = packing.join_answers(parts)
    assert joined.steps == (0, 2, 3) and torch.equal(joined.velocity, velocity)
    assert packing.join_answers(parts[:1]) is parts[0]
    for wrong in (parts[::-1], [parts[0], parts[0]], [parts[0], replace(parts[1], teacher="other")]):
        with pytest.raises(ValueError, match="are not one answer"):
            packing.join_answers(wrong)


def test_records_hold_no_tensor():
    trajectory = Trajectory(
        item(),
        WeightVersion(0, 0, 0),
        torch.linspace(1, 0, 4),
        torch.zeros(2, 4, 1, 1, 1),
        {"e": torch.ones(2, 1)},
        {},
    )
    for record in (
        packing.pack_trajectory(trajectory)[1],
        packing.pack_answer(TeacherAnswer("t", (0,), torch.zeros(2, 1)))[1],
    ):
        text = repr(record)
        assert "tensor(" not in text and "array(" not in text
        hash(record)  # frozen all the way down
