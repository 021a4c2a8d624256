"""``opd-ray demo``: the main job on the built-in tiny world, in minutes, without a download or a GPU."""

import shutil
from pathlib import Path
from typing import Any

from opd_ray.commands.options import Json, Override, Runs, RunSeed, overrides
from opd_ray.commands.train import run_training, show
from opd_ray.config import Config
from opd_ray.console import errors
from opd_ray.errors import RunFolderError
from opd_ray.recipes import load

__all__ = ["demo"]


def demo(
    override: Override = None,
    seed: RunSeed = None,
    out: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Distil three specialists of the tiny world into one student, and show the pictures."""
    config = load("demo", overrides(override, seed))
    folder = out / config.name
    _make_room(config, folder)
    errors.print("Three specialists (compose, text, look) teach one student on its own drawings; Ray starts first.")
    result = run_training(config, folder, resume=False)
    show(result, folder, as_json=json)


def _make_room(config: Config, folder: Path) -> None:
    """Remove the last demo, which anybody can make again; never another run, and not for one that cannot start."""
    from opd_ray.algorithms import make_algorithm
    from opd_ray.build import preflight
    from opd_ray.storage.run_folder import read_json

    if not folder.exists():
        return
    elsewhere = "move it away, use --out, or name this one with -o name=..."
    path = folder / "run.json"
    if not path.is_file():
        raise RunFolderError(f"{folder} is there and is no run; {elsewhere}")
    run = read_json(path)
    if not _is_demo(run.get("identity") if isinstance(run, dict) else None):
        raise RunFolderError(f"{folder} holds another run than the demo; {elsewhere}")
    preflight(config, make_algorithm(config))
    errors.print(f"removing the last demo in {folder}", soft_wrap=True)
    shutil.rmtree(folder)


def _is_demo(identity: Any) -> bool:
    """Whether a run took everything that it learnt from out of this package."""
    match identity:
        case {"model": {"path": "world"}, "teachers": dict(teachers), "prompts": {"train": dict(files)}}:
            sources = [*(teacher["lora"] for teacher in teachers.values()), *files.values()]
            return all(str(source).startswith("world/") for source in sources)
    return False
