"""``opd-ray demo``: the main job on the built-in tiny world, in minutes, without a download or a GPU."""

import shutil
import time
from pathlib import Path

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
    resume = _make_room(config, folder)
    errors.print("Three specialists (compose, text, look) teach one student on its own drawings; Ray starts first.")
    result = run_training(config, folder, resume=resume)
    show(result, folder, as_json=json)


def _make_room(config: Config, folder: Path) -> bool:
    """Remove the last demo, which this very command makes again; True where it did not come to its end and goes on.

    Never another run, nor a demo with other settings, and nothing for a demo that cannot start.
    """
    if not folder.exists():
        return False
    from opd_ray.algorithms import make_algorithm
    from opd_ray.preflight import identity, preflight
    from opd_ray.storage.control import HEARTBEAT_S
    from opd_ray.storage.run_folder import differences, read_json

    elsewhere = "move it away, use --out, or name this one with -o name=..."
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder} is there and is no run; {elsewhere}")
    run = read_json(folder / "run.json")
    if run.get("abandoned"):
        return False
    if other := differences(run.get("identity", {}), identity(config)):
        raise RunFolderError(f"{folder} holds another run than this demo ({'; '.join(other)}); {elsewhere}")
    state = read_json(folder / "status.json") if (folder / "status.json").is_file() else {}
    if state.get("status") == "running" and _alive(state["pid"]) and time.time() - state["time"] < HEARTBEAT_S:
        raise RunFolderError(f"{folder} is being made by process {state['pid']}; wait for it, or {elsewhere}")
    if state.get("status") != "done":
        errors.print(f"going on with the demo in {folder}, which did not come to its end", soft_wrap=True)
        return True
    preflight(config, make_algorithm(config))
    errors.print(f"removing the last demo in {folder}", soft_wrap=True)
    shutil.rmtree(folder)
    return False


def _alive(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    return Path(f"/proc/{pid}").exists()
