"""Merges of LoRAs by what they do to the weights: the product gamma B A of each module, never A and B apart.

With delta_i = gamma_i B_i A_i of LoRA i (gamma is alpha / r, or alpha / sqrt(r) of rsLoRA) and a scale lambda:

    mean   delta = lambda / n  sum_i delta_i
           exactly: [c_1 B_1, ..., c_n B_n] [A_1; ...; A_n] with c_i = lambda gamma_i / n, at the sum of the ranks
    ties   delta = lambda  TIES(delta_1, ..., delta_n)      (TIES-Merging, arXiv 2306.01708, Algorithm 1)
           of each LoRA's numbers, all modules together, the largest ``density`` stay; each place takes the sign of
           their sum, and the mean of those that have that sign

A module that a LoRA does not adapt has a delta of zero in it. The mean of the products is not the product of the means:
mean(B) mean(A) holds every B_i A_j with i != j, which no LoRA was trained to do. What TIES makes is no product of thin
matrices; it is cut to a rank by its singular values, and ``Merged.kept`` says how much of it is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opd_ray.errors import ModelError
from opd_ray.models.lora import PEFT_PREFIX, A, B, LoraFile, strength, write_lora

__all__ = ["Merged", "Method", "merge_loras", "part_of", "product", "ties"]

Method = Literal["mean", "ties"]
UNET = ("unet.", "down_blocks.", "mid_block.", "up_blocks.")


@dataclass(frozen=True, slots=True)
class Merged:
    """A LoRA that was made of others. Its alphas are its ranks: the product B A is the change of the weights."""

    tensors: Mapping[str, Tensor]
    """By canonical name, float32."""
    kept: float
    """Share of the merge's squared size that its rank holds; 1 where nothing was cut."""

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank."""
        return {name.removesuffix(A): len(tensor) for name, tensor in self.tensors.items() if name.endswith(A)}

    def write(self, folder: Path, *, part: str = "transformer") -> None:
        """Write it as a run writes its LoRA: diffusers' file, and PEFT's folder in ``folder/peft``."""
        import peft

        ranks = self.ranks
        most = max(ranks.values())
        others = {f"^{module}": rank for module, rank in ranks.items() if rank != most}
        config = peft.LoraConfig(
            r=most,
            lora_alpha=most,
            target_modules=sorted(ranks),
            rank_pattern=others,
            alpha_pattern=dict(others),
        )
        write_lora(folder, self.tensors, config, part=part)


def part_of(names: Sequence[str]) -> str:
    """The part of a pipeline that tensors of a LoRA file are of, by their names: `transformer` or `unet`."""
    return "unet" if any(name.removeprefix(PEFT_PREFIX).startswith(UNET) for name in names) else "transformer"


def merge_loras(
    files: Sequence[LoraFile], method: Method, *, scale: float = 1.0, density: float = 0.2, rank: int | None = None
) -> Merged:
    """One LoRA of several.

    Args:
        files: two or more over one base.
        method: of the module's docstring.
        scale: lambda; of `mean`, their number gives the sum of the LoRAs (task arithmetic).
        density: share of each LoRA's numbers that `ties` keeps, in (0, 1]; the paper's 0.2.
        rank: largest of each module; the sum of the LoRAs' ranks where not given. At min(in, out) nothing is cut.

    Raises:
        ModelError: they are fewer than two, a module's shape is another in one of them, or the merge is zero.
    """
    if len(files) < 2:
        raise ModelError(f"{len(files)} LoRA to merge; give two or more")
    modules = sorted({module for file in files for module in file.modules})
    for module in modules:
        _require_alike(module, files)
    if method == "mean":
        pairs = {module: _side_by_side(module, files, scale / len(files)) for module in modules}
        cut = rank is not None
    else:
        deltas = ties([{module: product(file, module) for module in file.modules} for file in files], density)
        pairs = {module: (scale * deltas[module], None) for module in modules}
        cut = True
    tensors, whole, left = dict[str, Tensor](), 0.0, 0.0
    for module, (up, down) in pairs.items():
        if cut:
            delta = up if down is None else up @ down
            most = rank or sum(len(file.tensors[module + A]) for file in files if module + A in file.tensors)
            up, down, lost = _cut(delta, most)
            size = float(delta.double().square().sum())
            whole, left = whole + size, left + size - lost
        assert down is not None
        tensors |= _shaped(module, up, down, files)
    if not any(bool((tensors[module + B].flatten(1) @ tensors[module + A].flatten(1)).any()) for module in modules):
        raise ModelError("the merge changes nothing: the LoRAs cancel each other out, or the scale is 0")
    return Merged(tensors, left / whole if cut and whole else 1.0)


def product(file: LoraFile, module: str) -> Tensor:
    """Gamma B A [out, in], float32; the kernel of a convolution is flattened into ``in``."""
    down, up = (file.tensors[module + half].float().flatten(1) for half in (A, B))
    return strength(file, module) * (up @ down)


def ties(deltas: Sequence[Mapping[str, Tensor]], density: float) -> dict[str, Tensor]:
    """Trim, elect signs, and take the mean of those that agree (TIES-Merging, Algorithm 1, without its lambda).

    Args:
        deltas: of each model, by name; a name that one of them lacks is zero there.
        density: share of each model's numbers, of all names together, that stays.
    """
    least = [_threshold(delta, density) for delta in deltas]
    merged = {}
    for name in sorted({name for delta in deltas for name in delta}):
        trimmed = torch.stack(
            [
                torch.where(delta[name].abs() >= limit, delta[name], torch.zeros(()))
                for delta, limit in zip(deltas, least, strict=True)
                if name in delta
            ]
        )
        agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        merged[name] = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged


def _threshold(delta: Mapping[str, Tensor], density: float) -> Tensor:
    """The smallest magnitude that stays."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in delta.values()])
    stay = max(round(density * len(sizes)), 1)
    return sizes.kthvalue(len(sizes) - stay + 1).values


def _require_alike(module: str, files: Sequence[LoraFile]) -> None:
    shapes = {
        file.name: (file.tensors[module + B].shape[0], *file.tensors[module + A].shape[1:])
        for file in files
        if module + A in file.tensors
    }
    (first, expected), *others = shapes.items()
    for name, shape in others:
        if shape != expected:
            raise ModelError(
                f"LoRA {name!r} has {module} of {list(shape)}, and LoRA {first!r} of {list(expected)}: they are not of "
                "one base; merge those of one"
            )


def _side_by_side(module: str, files: Sequence[LoraFile], weight: float) -> tuple[Tensor, Tensor | None]:
    """B [out, sum of ranks] and A [sum of ranks, in] whose product is the weighted sum of the products."""
    having = [file for file in files if module + A in file.tensors]
    ups = [weight * strength(file, module) * file.tensors[module + B].float().flatten(1) for file in having]
    return torch.cat(ups, dim=1), torch.cat([file.tensors[module + A].float().flatten(1) for file in having])


def _cut(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest B A of a rank (Eckart and Young), both of one size, and the squared size of what it leaves out."""
    u, sizes, v = torch.linalg.svd(delta, full_matrices=False)
    root = sizes[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank], float(sizes[rank:].double().square().sum())


def _shaped(module: str, up: Tensor, down: Tensor, files: Sequence[LoraFile]) -> dict[str, Tensor]:
    """A and B in the shape of the module's own."""
    like: Any = next(file for file in files if module + A in file.tensors).tensors
    down_shape, up_shape = like[module + A].shape[1:], like[module + B].shape[2:]
    return {
        module + A: down.reshape(len(down), *down_shape).contiguous(),
        module + B: up.reshape(*up.shape, *up_shape).contiguous(),
    }
