"""``opd-ray merge A B C``: one LoRA of several, without training."""

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_ray.commands.options import Json, require_folder
from opd_ray.console import console
from opd_ray.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from opd_ray.models.lora import LoraFile

__all__ = ["merge"]

ABOUT = "merge.json"


class How(StrEnum):
    """Of ``--method``."""

    mean = "mean"
    ties = "ties"


def merge(
    loras: Annotated[
        list[str], typer.Argument(metavar="LORA...", help="Two or more: folders, files, hub ids, runs, `world/<name>`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new LoRA; it must not hold one yet.")],
    method: Annotated[How, typer.Option(help="mean: of the products B A, exact. ties: TIES-Merging.")] = How.mean,
    scale: Annotated[float, typer.Option(help="Strength of the merge; of mean, 3 is the sum of three.")] = 1.0,
    density: Annotated[float, typer.Option(help="Share of each LoRA's numbers that ties keeps.")] = 0.2,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a module.", show_default="sum of the LoRAs'")
    ] = None,
    json: Json = False,
) -> None:
    """Write a LoRA that diffusers, PEFT and this package load; sample or evaluate it as BASE+OUT."""
    if not math.isfinite(scale) or scale == 0:
        raise ConfigError(f"--scale {scale:g}: expected a number other than 0")
    if not 0 < density <= 1:
        raise ConfigError(f"--density {density:g}: expected a share above 0, at most 1")
    from opd_ray.models.lora import WEIGHTS
    from opd_ray.models.merging import merge_loras, part_of
    from opd_ray.storage.run_folder import write_json_atomic

    if (out / WEIGHTS).exists():
        raise RunFolderError(f"--out: {out} holds a LoRA already; choose another place")
    files = [_read(path) for path in loras]
    parts = {file.name: part_of([*file.tensors]) for file in files}
    if len(set(parts.values())) > 1:
        told = ", ".join(f"{name} a {part}" for name, part in parts.items())
        raise ConfigError(f"LoRAs of different parts cannot be merged: {told}; merge those of one base")
    merged = merge_loras(files, method.value, scale=scale, density=density, rank=rank)
    require_folder(out)
    merged.write(out, part=next(iter(parts.values())))
    told_rank = max(merged.ranks.values())
    about: dict[str, Any] = {"method": method.value, "scale": scale}
    about |= {"density": density} if method is How.ties else {}
    about |= {"rank": told_rank, "kept": merged.kept, "modules": len(merged.ranks)}
    about |= {"loras": [{"path": path, "sha256": file.sha256} for path, file in zip(loras, files, strict=True)]}
    write_json_atomic(out / ABOUT, about)
    if json:
        console.print_json(data={"out": str(out), **about})
        return
    left = "" if merged.kept == 1 else f", which holds {merged.kept:.1%} of its squared size"
    console.print(
        f"{method.value} of {len(files)} LoRAs in {out}: {len(merged.ranks)} modules, rank {told_rank}{left}",
        soft_wrap=True,
    )


def _read(path: str) -> "LoraFile":
    """A LoRA of either part."""
    from safetensors import safe_open

    from opd_ray.models.checkpoint import refusing
    from opd_ray.models.lora import find, read_lora
    from opd_ray.models.merging import part_of

    file = find(path, path, None, None)
    with refusing(f"LoRA {path!r} ({file}) cannot be read"), safe_open(file, framework="pt") as content:
        part = part_of([*content.keys()])
    return read_lora(path, str(file), part=part)
