"""Stored bytes straight into parameters: bit for bit, one copy, and nothing keeps the stored memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.digest import checksum
from opd_ray.storage.packing import BUCKET, bind_into, buckets, pack
from tests.storage.test_packing import content, named


def packed(tensors, size=BUCKET):
    """An array and its manifest for each bucket."""
    pairs = [pack(bucket) for bucket in buckets(tensors, size)]
    return [flat for flat, _ in pairs], [manifest for _, manifest in pairs]


def frozen(flats):
    for flat in flats:
        flat.setflags(write=False)
    return flats


@settings(max_examples=200)
@given(named, st.sampled_from([1, 64, 100, 10**6]))
def test_any_weights_arrive_bit_for_bit_in_any_number_of_buckets(original, size):
    flats, manifests = packed(original, size)
    parameters = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
    places = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    bind_into(parameters, iter(frozen(flats)), manifests)
    assert {k: content(v) for k, v in parameters.items()} == {k: content(v) for k, v in original.items()}
    assert checksum(parameters) == checksum(original)
    assert places == {name: tensor.data_ptr() for name, tensor in parameters.items()}, "in place"


def test_a_bucket_ends_where_the_next_tensor_is_too_much():
    sizes = {"a": 60, "b": 40, "c": 1, "huge": 500, "d": 100, "e": 0, "f": 1}
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    assert [list(bucket) for bucket in buckets(tensors, 100)] == [["a", "b"], ["c"], ["huge"], ["d", "e"], ["f"]]
    assert buckets({}) == [{}]


@pytest.mark.parametrize("strided", [False, True])
def test_bound_parameters_share_nothing_with_what_was_stored(strided):
    flats, manifests = packed({"w": torch.arange(12.0).view(3, 4)})
    before = frozen(flats)[0].copy()
    parameter = torch.nn.Parameter(torch.zeros(4, 3).T if strided else torch.zeros(3, 4))
    bind_into({"w": parameter}, flats, manifests)
    assert torch.equal(parameter.detach(), torch.arange(12.0).view(3, 4)) and parameter.requires_grad
    with torch.no_grad():
        parameter.add_(1)
    assert (flats[0] == before).all()
    assert not np.shares_memory(flats[0], parameter.detach().numpy())


def test_what_does_not_fit_is_refused_before_anything_is_written():
    flats, manifests = packed({"a": torch.ones(2), "b": torch.ones(2, 2)}, 8)
    for wrong, message in (
        ({"a": torch.zeros(2)}, r"b is float32 \(2, 2\), here missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, r"b is float32 \(2, 2\), here float32 \(4,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, 2).int()}, r"b is float32 \(2, 2\), here int32 \(2, 2\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(2, 2), "c": torch.zeros(1)}, r"c is missing, here float32 \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bind_into(wrong, flats, manifests)
        assert not any(tensor.any() for tensor in wrong.values())
    own = {"a": torch.zeros(2), "b": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="sent twice"):
        bind_into(own, [flats[0], flats[0], flats[1]], [manifests[0], manifests[0], manifests[1]])
    with pytest.raises(ValueError, match="its manifest describes"):
        bind_into(own, flats[::-1], manifests)
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        bind_into(own, flats[:1], manifests)


def test_a_part_of_an_array_can_be_bound():
    flat, manifest = pack({"w": torch.ones(3), "probe": torch.ones(2)})
    own = {"w": torch.zeros(3)}
    bind_into(own, [flat], [manifest.without("probe")])
    assert own["w"].tolist() == [1, 1, 1]
    assert [entry.name for entry in manifest.only("probe").entries] == ["probe"]
