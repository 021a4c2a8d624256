"""``opd-ray demo``: the main job on the built-in tiny world, in minutes, without a download or a GPU."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from opd_ray.commands.train import run_training, show
from opd_ray.console import console
from opd_ray.errors import RunFolderError
from opd_ray.recipes import load

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    override: Annotated[list[str] | None, typer.Option("--override", "-o", help="key=value")] = None,
) -> None:
    """Distil three specialists of the tiny world into one student, and show the pictures."""
    config = load("demo", override or [])
    folder = out / config.name
    if folder.exists():
        if not (folder / "run.json").is_file():
            raise RunFolderError(f"{folder} is there and is no run; move it away or use --out")
        console.print(f"removing the last demo in {folder}", markup=False)
        shutil.rmtree(folder)
    console.print(
        "Three specialists (compose, text, look) teach one student on its own drawings; Ray starts first.",
        markup=False,
    )
    result = run_training(config, folder, resume=False)
    show(result, folder, as_json=False)
