"""Merges of LoRAs: what they do to the weights is the mean, or TIES, of what the LoRAs do; by arithmetic."""

from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from opd_ray.config import LoraConfig, ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models import load_family
from opd_ray.models.lora import LoraFile, read_lora, write_lora
from opd_ray.models.merging import merge_loras, part_of, product, ties


def lora(name: str, pairs: dict[str, tuple[list, list]], alpha: float, rank: int = 1, **config) -> LoraFile:
    """A file of pairs A [r, in] and B [out, r]."""
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors |= {f"{module}.lora_A.weight": torch.tensor(down), f"{module}.lora_B.weight": torch.tensor(up)}
    return LoraFile(name, Path(name), "", tensors, {"r": rank, "lora_alpha": alpha, **config})


X = lora("x", {"m": ([[1.0, 2.0]], [[1.0], [0.0], [3.0]])}, alpha=2)
"""2 * [1 0 3]^T [1 2] = [[2 4] [0 0] [6 12]]"""
Y = lora("y", {"m": ([[0.0, 1.0]], [[1.0], [1.0], [-1.0]]), "n": ([[1.0]], [[5.0]])}, alpha=1)
"""[1 1 -1]^T [0 1] = [[0 1] [0 1] [0 -1]], and 5 in a module of its own"""


def change(merged, module: str) -> torch.Tensor:
    """B A, whose factor is 1."""
    return merged.tensors[f"{module}.lora_B.weight"] @ merged.tensors[f"{module}.lora_A.weight"]


class TestMean:
    def test_is_that_of_the_products_and_its_ranks_are_the_sums(self):
        merged = merge_loras([X, Y], "mean")
        assert change(merged, "m").tolist() == [[1, 2.5], [0, 0.5], [3, 5.5]]
        assert change(merged, "n").tolist() == [[2.5]], "x does nothing there, which is a zero"
        assert merged.ranks == {"m": 2, "n": 1} and merged.kept == 1

    def test_scale_is_a_factor_and_their_number_the_sum(self):
        assert change(merge_loras([X, Y], "mean", scale=2), "m").tolist() == [[2, 5], [0, 1], [6, 11]]

    def test_a_rank_cuts_it_by_singular_values_and_says_what_is_left(self):
        """diag(3, 1) of two LoRAs of rank 1; at rank 1 diag(3, 0) is left, 9 of 10 of its square."""
        first = lora("x", {"m": ([[6.0, 0.0]], [[1.0], [0.0]])}, alpha=1)
        second = lora("y", {"m": ([[0.0, 2.0]], [[0.0], [1.0]])}, alpha=1)
        cut = merge_loras([first, second], "mean", rank=1)
        assert torch.allclose(change(cut, "m"), torch.tensor([[3.0, 0], [0, 0]]), atol=1e-6)
        assert cut.kept == pytest.approx(0.9) and cut.ranks == {"m": 1}
        whole = merge_loras([first, second], "mean", rank=9)
        assert torch.allclose(change(whole, "m"), torch.tensor([[3.0, 0], [0, 1]]), atol=1e-6)
        assert whole.kept == pytest.approx(1) and whole.ranks == {"m": 2}

    def test_the_strength_is_pefts(self):
        pairs = {"a.m": ([[1.0], [0.0], [0.0], [0.0]], [[1.0, 0.0, 0.0, 0.0]])}
        for config, expected in (
            ({}, 8 / 4),
            ({"use_rslora": True}, 8 / 2),
            ({"alpha_pattern": {"^a.m": 12}}, 12 / 4),
            ({"alpha_pattern": {"m": 12, "a.m": 20}}, 12 / 4),
            ({"alpha_pattern": {"other": 12}}, 8 / 4),
        ):
            assert product(lora("x", pairs, 8, 4, **config), "a.m").tolist() == [[expected]], config

    def test_convolutions_keep_their_kernels(self):
        torch.manual_seed(0)
        files = [
            LoraFile(
                name,
                Path(name),
                "",
                {"c.lora_A.weight": torch.randn(2, 3, 3, 3), "c.lora_B.weight": torch.randn(5, 2, 1, 1)},
                {"r": 2, "lora_alpha": 2},
            )
            for name in "xy"
        ]
        for method, density in (("mean", 1.0), ("ties", 0.5)):
            merged = merge_loras(files, method, density=density).tensors
            assert merged["c.lora_A.weight"].shape == (4, 3, 3, 3) and merged["c.lora_B.weight"].shape == (5, 4, 1, 1)
        expected = (product(files[0], "c") + product(files[1], "c")) / 2
        merged = merge_loras(files, "mean").tensors
        found = merged["c.lora_B.weight"].flatten(1) @ merged["c.lora_A.weight"].flatten(1)
        assert torch.allclose(found, expected, atol=1e-6)


class TestTies:
    def test_by_hand(self):
        """Half of each stays; then signs of the sums [-1, -3, 1, 0], and means of those that agree."""
        first, second, third = (
            {"m": torch.tensor(row)} for row in ([4.0, -1, 2, 0.1], [-1.0, -3, 2, 0.2], [-5.0, 0.5, -3, 0.1])
        )
        assert ties([first, second, third], 0.5)["m"].tolist() == [-5, -3, 2, 0]

    def test_what_stays_is_chosen_among_all_modules_together(self):
        first = {"m": torch.tensor([1.0, 2.0]), "n": torch.tensor([8.0, -9.0])}
        found = ties([first, {"m": torch.tensor([0.0, -7.0])}], 0.5)
        assert found["n"].tolist() == [8, -9] and found["m"].tolist() == [0, -7]

    def test_a_merge_of_one_twice_is_its_own_largest_numbers(self):
        """X's change is [[2 4] [0 0] [6 12]]: a third of six numbers are two; in a row, of rank 1."""
        merged = merge_loras([X, X], "ties", density=1 / 3, scale=0.5)
        assert torch.allclose(change(merged, "m"), torch.tensor([[0.0, 0], [0, 0], [3, 6]]), atol=1e-6)
        assert merged.kept == pytest.approx(1)


def test_a_network_under_the_mean_is_one_whose_weights_were_moved_by_it(tiny, tiny_teachers, tmp_path):
    """Through the file that is written: ours, and stock diffusers'. The mean of A and of B apart is another model."""
    files = [read_lora(name, str(folder)) for name, folder in tiny_teachers.items()]
    merge_loras(files, "mean", scale=1.5).write(tmp_path)
    model = ModelConfig(path=str(tiny))
    moved, ours = (load_family(model, text=False, image=False) for _ in range(2))
    with torch.no_grad():
        for module in files[0].modules:
            weight = moved.network.get_submodule(module).weight
            for file in files:
                down, up = file.tensors[f"{module}.lora_A.weight"], file.tensors[f"{module}.lora_B.weight"]
                weight += 1.5 / 2 * (8 / 4) * up @ down
    full = load_family(model, text=True, image=False)
    cond = full.encode(["a red cat", "two dogs"])
    x = torch.randn((2, *ours.latent_shape), generator=torch.Generator().manual_seed(3))
    base = ours.velocity(x, 0.6, cond, {}, 1).detach()
    expected = moved.velocity(x, 0.6, cond, {}, 1).detach()
    assert ours.load_lora("merged", str(tmp_path)).rank == 8
    ours.use("merged")
    found = ours.velocity(x, 0.6, cond, {}, 1).detach()
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(base, expected, atol=1e-3)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny)
    pipeline.load_lora_weights(tmp_path)
    raw = pipeline.transformer(x, timestep=torch.full((2,), 600.0), return_dict=False, **cond)[0]
    assert torch.allclose(raw, expected, atol=1e-5)
    apart = {key: 0.5 * sum(file.tensors[key] for file in files) for key in files[0].tensors}
    write_lora(tmp_path / "apart", apart, peft.LoraConfig(r=4, lora_alpha=12, target_modules=files[0].modules))
    ours.load_lora("apart", str(tmp_path / "apart"))
    ours.use("apart")
    assert not torch.allclose(ours.velocity(x, 0.6, cond, {}, 1).detach(), expected, atol=1e-3)


def test_of_several_ranks_each_module_keeps_its_own(tiny, tiny_teachers, tmp_path):
    """A third LoRA of other targets, rank and alpha: what is read back is what was merged."""
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    family.add_lora("few", LoraConfig(rank=2, alpha=3, targets=("attn.to_q",)), 0)
    with torch.no_grad():
        for parameter in family.adapter_parameters("few").values():
            parameter.fill_(0.1)
    family.save_lora("few", tmp_path / "few")
    paths = [*tiny_teachers.values(), tmp_path / "few"]
    files = [read_lora(path.name, str(path)) for path in paths]
    merged = merge_loras(files, "mean")
    merged.write(tmp_path / "out")
    assert set(merged.ranks.values()) == {8, 10}
    again = read_lora("out", str(tmp_path / "out"))
    for module in again.modules:
        expected = sum(product(file, module) for file in files if f"{module}.lora_A.weight" in file.tensors) / 3
        assert torch.allclose(product(again, module), expected, atol=1e-6), module


class TestRefusals:
    def test_one_is_no_merge(self):
        with pytest.raises(ModelError, match="1 LoRA to merge; give two or more"):
            merge_loras([X], "mean")

    def test_another_base(self):
        other = lora("z", {"m": ([[1.0, 2.0, 3.0]], [[1.0], [0.0], [3.0]])}, alpha=2)
        with pytest.raises(ModelError, match=r"LoRA 'z' has m of \[3, 3\], and LoRA 'x' of \[3, 2\]"):
            merge_loras([X, Y, other], "mean")

    def test_what_cancels_out(self):
        opposite = lora("z", {"m": ([[-1.0, -2.0]], [[1.0], [0.0], [3.0]])}, alpha=2)
        with pytest.raises(ModelError, match="the merge changes nothing"):
            merge_loras([X, opposite], "mean")


def test_the_part_is_told_by_names():
    assert part_of(["unet.down_blocks.0.x.lora_A.weight"]) == "unet"
    assert part_of(["base_model.model.mid_block.x.lora_A.weight"]) == "unet"
    assert part_of(["base_model.model.transformer_blocks.0.x.lora_A.weight"]) == "transformer"
