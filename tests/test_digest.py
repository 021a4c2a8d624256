"""The fast checksum: whatever is changed, swapped, moved or left out shows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray import digest
from opd_ray.digest import checksum

ROW = 64
"""Small rows in these tests, so that a tensor has many."""


@pytest.fixture(autouse=True, scope="module")
def small_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "ROW", ROW)
        yield


def random_bytes(count, seed=0):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


sizes = st.integers(1, 20 * ROW)


@settings(max_examples=200)
@given(sizes, st.data())
def test_any_changed_byte_shows(count, data):
    tensor = random_bytes(count, count)
    before = checksum({"w": tensor, "v": torch.ones(3)})
    place, change = data.draw(st.integers(0, count - 1)), data.draw(st.integers(1, 255))
    tensor[place] ^= change
    assert checksum({"w": tensor, "v": torch.ones(3)}) != before


@settings(max_examples=200)
@given(st.integers(2, 300), st.data())
def test_any_two_numbers_that_change_places_show(count, data):
    """Also where they differ in their signs alone, which multiplication hardly moves."""
    tensor = torch.full((count,), 0.5)
    one, other = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    tensor[one] = data.draw(st.sampled_from([-0.5, 0.25, 0.0, -0.0, 1e30]))
    before = checksum({"w": tensor})
    tensor[[one, other]] = tensor[[other, one]]
    assert checksum({"w": tensor}) != before


@pytest.mark.parametrize("content", ["random", "signs", "zeros and a sign", "zeros and ones"])
def test_any_two_blocks_that_change_places_show(content):
    rows = 20
    tensor = random_bytes(rows * ROW).view(torch.float32).nan_to_num().view(rows, -1)
    if content == "signs":
        tensor = tensor.new_ones(tensor.shape) * torch.where(torch.rand(tensor.shape) < 0.5, 1.0, -1.0)
    if content == "zeros and a sign":
        tensor = torch.zeros_like(tensor)
        tensor[:, 1] = torch.tensor([-0.0 if row % 2 else 0.0 for row in range(rows)])
    if content == "zeros and ones":
        tensor = torch.arange(rows).view(-1, 1).remainder(2).expand(-1, ROW).to(torch.uint8).contiguous()
    before = checksum({"w": tensor})
    for one, other in itertools.combinations(range(rows), 2):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        different = not torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))
        assert (checksum({"w": swapped}) != before) == different, (one, other)


@settings(max_examples=100)
@given(sizes, sizes)
def test_where_one_tensor_ends_shows(first, second):
    both = random_bytes(first + second)
    one = checksum({"a": both[:first], "b": both[first:]})
    assert one == checksum({"b": both[first:].clone(), "a": both[:first].clone()})
    assert one != checksum({"a": both[first:], "b": both[:first]}) or torch.equal(both[:first], both[first:])
    assert one != checksum({"a": both}) and one != checksum({"a": both[:first]})
    moved = checksum({"a": both[: first - 1], "b": both[first - 1 :]})
    assert one != moved


def test_zeros_count_too():
    seen = {checksum({"a": torch.zeros(count)}) for count in range(100)}
    assert len(seen) == 100 and checksum({}) not in seen


def test_neither_threads_nor_strides_change_it():
    tensor = torch.randn(500, 300)
    before, threads = checksum({"w": tensor}), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert checksum({"w": tensor}) == before
    finally:
        torch.set_num_threads(threads)
    assert checksum({"w": tensor.T.contiguous().T}) == before


def test_it_is_a_fixed_function(monkeypatch):
    """Sender and receiver may run other releases of numpy and torch."""
    monkeypatch.setattr(digest, "ROW", 2**18)
    tensors = {"w": torch.arange(2**18, dtype=torch.int32).view(2, -1), "b": torch.tensor([1.5, -0.0]).bfloat16()}
    assert checksum(tensors) == "8b14dd4d06fefa73d23ec5833ea2a57f20774842e048b0081bb659ef7f6a856d"
    content, mask = tensors["w"].numpy().tobytes(), 2**64 - 1
    state = [(lane + 1) * 0x9E3779B97F4A7C15 & mask for lane in range(2**15)]
    for number in range(4):
        row = content[number * 2**18 : (number + 1) * 2**18]
        row = row[number:] + row[:number]
        for lane in range(2**15):
            mixed = state[lane] ^ (state[lane] >> 32) if number == 0 else state[lane]
            if number % 2 == 0:
                mixed = mixed * 0x9E3779B97F4A7C15 & mask
            pairs = zip(mixed.to_bytes(8, "little"), row[8 * lane : 8 * lane + 8], strict=True)
            state[lane] = int.from_bytes(bytes(a ^ b if number % 2 else (a + b) % 256 for a, b in pairs), "little")
    seen = digest._start(2**18)
    digest._absorb(seen, digest.as_bytes(tensors["w"]).numpy())
    assert seen.tobytes() == b"".join(lane.to_bytes(8, "little") for lane in state)
