"""Adapters in memory: their names, their seeds, which is in use and which is trainable."""

import pytest
import torch

from opd_ray.config import LoraConfig
from opd_ray.errors import ModelError
from tests.models.conftest import fill

LORA = LoraConfig(rank=4, alpha=16)


def trainable(family):
    return {name for name, p in family.network.named_parameters() if p.requires_grad}


def test_a_fresh_adapter_has_a_gaussian_a_of_std_one_over_rank_and_changes_nothing(family, answer):
    base = answer(family)
    family.add_lora("student", LORA, seed=0)
    assert trainable(family) == set()
    assert family.active is None
    parameters = family.adapter_parameters("student")
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert ("lora_B" in name) == (not parameter.any())
    down = torch.cat([p.flatten() for name, p in parameters.items() if "lora_A" in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.05)
    family.use("student")
    assert torch.equal(answer(family), base)


def test_canonical_names_are_sorted_and_free_of_adapter_and_engine(family):
    family.add_lora("student", LORA, seed=0)
    names = list(family.adapter_parameters("student"))
    assert names == sorted(names)
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in names
    # 3 blocks of 8 projections; the last block gives no text back and has no to_add_out.
    assert len(names) == 2 * (3 * 8 - 1)
    assert not any("attn2" in name for name in names)  # the endings name `attn` alone


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(family):
    state = torch.get_rng_state()
    family.add_lora("one", LORA, seed=7)
    torch.manual_seed(123)
    elsewhere = torch.get_rng_state()
    family.add_lora("same", LORA, seed=7)
    assert torch.equal(torch.get_rng_state(), elsewhere)
    family.add_lora("other", LORA, seed=8)
    torch.set_rng_state(state)
    family.add_lora("fewer", LoraConfig(rank=4, alpha=16, targets=("attn.to_q",)), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other, fewer = map(family.adapter_parameters, ("one", "same", "other", "fewer"))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert ("lora_B" in name) == torch.equal(one[name], other[name])
    assert all(torch.equal(fewer[name], one[name]) for name in fewer)
    key = "transformer_blocks.{}.attn.to_q.lora_A.weight"
    assert not torch.equal(one[key.format(0)], one[key.format(1)])


def test_names_that_peft_would_choke_on(family, answer):
    base = answer(family)
    for name in ("v1.5", "train", "attn", "lora_A", "slot0000", "weight"):
        family.add_lora(name, LORA, seed=0)
        assert len(family.adapter_parameters(name)) == 46
    fill(family, "attn")
    family.use("attn")
    assert not torch.allclose(answer(family), base)
    family.use("v1.5")
    assert torch.equal(answer(family), base)


def test_targets_that_match_nothing_are_named(family):
    lora = LoraConfig(targets=("attn.to_q", "attn.to_z", "pos_embed"))
    with pytest.raises(ModelError, match=r"'student': targets attn.to_z, pos_embed match no linear"):
        family.add_lora("student", lora, seed=0)
    assert family.adapters == ()
    family.add_lora("first", LORA, seed=0)
    # What an adapter has put inside a layer is no target.
    with pytest.raises(ModelError, match=r"targets base_layer match no"):
        family.add_lora("student", LoraConfig(targets=("base_layer",)), seed=0)
    family.add_lora("second", LoraConfig(targets=("to_out.0",)), seed=0)
    assert all(".to_out.0.lora_" in name for name in family.adapter_parameters("second"))


def test_a_name_is_taken_once_and_unknown_names_say_what_is_there(family):
    family.add_lora("student", LORA, seed=0)
    with pytest.raises(ModelError, match=r"'student': there is an adapter of that name"):
        family.add_lora("student", LORA, seed=0)
    with pytest.raises(ModelError, match=r"no adapter 'old'; there are student"):
        family.use("old")
    with pytest.raises(ModelError, match=r"no adapter 'old'"), family.adapter("old"):
        pass
    assert family.active is None


@pytest.mark.parametrize("inside", ["old", None])
@pytest.mark.parametrize("raising", [True, False])
def test_the_block_restores_what_was_in_use_and_trainable(trained, answer, inside, raising):
    with trained.adapter(None):
        base = answer(trained)
    trained.add_lora("old", LORA, seed=1)  # B is zero: as the base
    trained.use("student")
    trained.train_adapter("student")
    before, student = trainable(trained), answer(trained)
    assert not torch.allclose(student, base, atol=1e-3)
    try:
        with trained.adapter(inside):
            assert trained.active == inside
            assert torch.equal(answer(trained), base)
            with trained.adapter("student"):
                assert torch.equal(answer(trained), student)
            assert torch.equal(answer(trained), base)
            trained.train_adapter("old")
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert trained.active == "student"
    assert trainable(trained) == before
    assert torch.equal(answer(trained), student)


def test_the_base_stays_in_use_after_a_block(trained, answer):
    base = answer(trained)
    with trained.adapter("student"):
        assert not torch.equal(answer(trained), base)
    assert trained.active is None
    assert torch.equal(answer(trained), base)


def test_only_train_adapter_decides_what_is_trainable(trained, batch):
    trained.train_adapter("student")
    expected = trainable(trained)
    assert len(expected) == 46
    trained.add_lora("old", LORA, seed=1)
    trained.use("old")
    assert trainable(trained) == expected
    trained.use("student")
    assert trainable(trained) == expected
    x, cond, _ = batch
    trained.velocity(x, 0.5, cond, {}, 1).square().mean().backward()
    have = {name for name, p in trained.network.named_parameters() if p.grad is not None}
    assert have == expected
    trained.train_adapter("old")
    assert trainable(trained).isdisjoint(expected)


def test_a_graph_survives_a_look_at_the_base(trained, batch):
    x, cond, _ = batch
    trained.use("student")
    trained.train_adapter("student")
    loss = trained.velocity(x, 0.5, cond, {}, 1).square().mean()
    with torch.no_grad(), trained.adapter(None):
        trained.velocity(x, 0.5, cond, {}, 1)
    loss.backward()
    assert all(p.grad is not None for p in trained.adapter_parameters("student").values())


def test_removing_leaves_the_others_as_they_were(trained, answer):
    base = answer(trained)
    trained.add_lora("old", LORA, seed=1)
    fill(trained, "old")
    trained.use("student")
    student = answer(trained)
    with pytest.raises(ModelError, match=r"'student' is in use"):
        trained.remove_adapter("student")
    trained.remove_adapter("old")
    assert trained.adapters == ("student",)
    assert torch.equal(answer(trained), student)
    trained.use(None)
    trained.remove_adapter("student")
    assert torch.equal(answer(trained), base)
    trained.add_lora("again", LORA, seed=0)
    assert torch.equal(answer(trained), base)
