"""What is installed, and what works here. A check imports what it looks at when it runs: little else may work."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from opd_ray import world
from opd_ray.config import Config
from opd_ray.errors import ConfigError, PlacementError, WorkerLostError
from opd_ray.planning.manifests import check_manifests

__all__ = ["Finding", "findings"]

IMPORT_ERRORS = (ImportError, OSError, RuntimeError)
"""A missing package, a missing system library, and a torchvision that was built for another torch."""
REINSTALL = "install again, in an environment of its own: pip install -c constraints.txt opd-ray"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    status: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""
    """What to do."""


def findings(config: Config, *, start_ray: bool, manifests: Path | None = None) -> Iterator[tuple[str, Finding]]:
    """Each check's name and what it found, as it is found; what libraries print goes to stderr."""
    object_store_mb = config.cluster.object_store_mb
    checks: dict[str, Callable[[], Finding]] = {
        "Python": python,
        "packages": packages,
        "tested set": tested_set,
        "torch": torch_build,
        "GPUs": gpus,
        "gloo": gloo,
        "Ray": partial(try_ray, object_store_mb) if start_ray else installed_ray,
        "killed runs": killed_runs,
        "working folder": working_folder,
        "model cache": model_cache,
        "shared memory": partial(shared_memory, object_store_mb),
        "hub token": hub_token,
        "hub": hub_mode,
        "built-in world": built_in_world,
    }
    if manifests is not None:
        checks["manifests"] = partial(fitting_manifests, config, manifests)
    for name, check in checks.items():
        with redirect_stdout(sys.stderr):
            try:
                finding = check()
            except IMPORT_ERRORS as error:
                finding = Finding("problem", _line(error), REINSTALL)
        yield name, finding


def python() -> Finding:
    """The interpreter, against the range of the package."""
    version, wanted = platform.python_version(), ",".join(_declared("Requires-Python"))
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("problem", f"{version}, outside {wanted}", "make the environment with another Python")
    return Finding("ok", f"{version}, within {wanted or 'an unknown range'}")


def packages() -> Finding:
    """What the package needs, against its ranges."""
    lines = map(Requirement, _declared("Requires-Dist"))
    needed = [one for one in lines if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not needed:
        return Finding("warning", "opd-ray itself is not installed, so their ranges are unknown", "pip install -e .")
    wrong = [
        f"{one.name} {_version(one.name) or 'missing'} (needs {one.specifier})"
        for one in needed
        if not one.specifier.contains(_version(one.name) or "0", prereleases=True)
    ]
    return Finding("problem", _first(wrong), REINSTALL) if wrong else Finding("ok", f"all {len(needed)} in range")


def tested_set() -> Finding:
    """What is installed, against constraints.txt: beside the checkout, or in the wheel."""
    package = Path(__file__).parent.parent
    found = [path for place in (package.parent, package) if (path := place / "constraints.txt").is_file()]
    if not found:
        return Finding("warning", "constraints.txt not found", "compare with the one of the release")
    pins = [Requirement(line) for line in found[0].read_text().splitlines() if line and not line.startswith("#")]
    here = {pin: version for pin in pins if (version := _version(pin.name)) is not None}
    other = [
        f"{pin.name} {version} (tested {str(pin.specifier).removeprefix('==')})"
        for pin, version in here.items()
        if not pin.specifier.contains(version, prereleases=True)
    ]
    if other:
        return Finding("warning", _first(other), "for the tested bits: pip install -c constraints.txt opd-ray")
    return Finding("ok", f"{len(here)} packages are the releases of constraints.txt")


def torch_build() -> Finding:
    """What torch was built for, and whether torchvision goes with it: if not, nothing of diffusers imports."""
    import torch
    import torchvision  # noqa: F401

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("ok", f"{torch.__version__}, built {build}; threads {torch.get_num_threads()}, cores {cores}")


def gpus() -> Finding:
    """The cards that torch sees."""
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{card.name} with {card.total_memory / 1e9:.0f} GB" for card in cards)
    return Finding("ok", ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none: runs on CPU")


def gloo() -> Finding:
    """A group of one process meets in a file, as learner ranks of one node do, sums, and parts."""
    import torch
    from torch import distributed

    from opd_ray.learners.engine import LOOPBACK

    os.environ.update(LOOPBACK)
    try:
        with tempfile.TemporaryDirectory() as folder:
            meeting, limit = Path(folder, "meeting").as_uri(), datetime.timedelta(seconds=30)
            distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1, timeout=limit)
            total = torch.ones(2)
            distributed.all_reduce(total)
            distributed.destroy_process_group()
        if total.tolist() != [1, 1]:
            raise ValueError(f"summed the ones of one process to {total.tolist()}")
    except (RuntimeError, OSError, ValueError, AttributeError) as error:  # the last: built without it
        return Finding("problem", _line(error), "see that the loopback interface is up, or reinstall torch")
    return Finding("ok", "a group of one process opened, summed and closed")


def installed_ray() -> Finding:
    """Its release alone."""
    version = _version("ray")
    return Finding("ok" if version else "problem", f"{version or 'missing'}, not started", "--ray tries it")


def try_ray(object_store_mb: int) -> Finding:
    """Whether it starts and a worker answers."""
    from opd_ray.runtime import trial

    try:
        return Finding("ok", f"{_version('ray')}, {trial.try_ray(object_store_mb)}")
    except (PlacementError, WorkerLostError) as error:
        where = "see that the Ray of RAY_ADDRESS is up" if os.environ.get("RAY_ADDRESS") else "read Ray's logs"
        return Finding("problem", f"{_version('ray')}, {error}", f"{where}; cluster.runtime=local works without")


def killed_runs() -> Finding:
    """What they left of Rays that they had started."""
    from opd_ray.runtime.session import forsaken

    left = [str(folder) for folder in forsaken()]
    if not left:
        return Finding("ok", "nothing of Ray is left of them")
    return Finding("warning", f"left of Ray: {_first(left)}", "opd-ray doctor --clean, or the next run, removes it")


def working_folder() -> Finding:
    """Room for run folders."""
    if not os.access(Path.cwd(), os.W_OK | os.X_OK):
        return Finding("problem", "cannot be written", "work in another one, or give --out")
    return _disk(Path.cwd(), 5, "free some, or give --out")


def model_cache() -> Finding:
    """Room for checkpoints from a hub; one with a T5 encoder is over 10 GB."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return _disk(Path(HF_HUB_CACHE), 20, "free some, or set HF_HOME, where checkpoints are downloaded")


def shared_memory(object_store_mb: int) -> Finding:
    """Where Ray's object store lies; Ray takes the disk if it does not fit."""
    if not Path("/dev/shm").is_dir():
        return Finding("warning", "no /dev/shm", "Ray's objects lie on disk: slower, not wrong")
    free = shutil.disk_usage("/dev/shm").free / 2**20
    found = f"{free:.0f} MiB free in /dev/shm, object store {object_store_mb} MiB"
    if free >= object_store_mb:
        return Finding("ok", found)
    return Finding("warning", found, "enlarge it (docker: --shm-size), or lower cluster.object_store_mb")


def hub_token() -> Finding:
    """Whether there is one, never which."""
    from huggingface_hub import get_token

    if get_token():
        return Finding("ok", "set in HF_TOKEN" if os.environ.get("HF_TOKEN") else "stored by a login")
    return Finding("warning", "none", "checkpoints behind a licence need one: `hf auth login`, or HF_TOKEN")


def hub_mode() -> Finding:
    """Whether a hub id may be downloaded."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    offline = "offline by HF_HUB_OFFLINE: folders and the model cache alone"
    return Finding("ok", offline if HF_HUB_OFFLINE else "online: hub ids are downloaded")


def built_in_world() -> Finding:
    """The tiny world's files are there and whole."""
    from safetensors import SafetensorError, safe_open

    files, broken = world.shipped_files(), []
    for path in files:
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "numpy")  # its header says how long the file is
            elif not path.read_bytes():
                broken.append(f"{path.parent.name}/{path.name} is empty")
        except (OSError, SafetensorError) as error:
            broken.append(f"{path.parent.name}/{path.name}: {error}")
    return Finding("problem", _first(broken), REINSTALL) if broken else Finding("ok", f"all {len(files)} files")


def fitting_manifests(config: Config, path: Path) -> Finding:
    """Whether KubeRay's manifests and the recipe's cluster belong together; ``-`` is stdin."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return Finding("ok", check_manifests(config, text, str(path)))
    except (OSError, UnicodeDecodeError) as error:
        return Finding("problem", f"{path} cannot be read ({error})", "give a file, or - for stdin")
    except ConfigError as error:
        return Finding("problem", str(error))


def _declared(key: str) -> list[str]:
    """What the installed package says of itself."""
    try:
        return importlib.metadata.metadata("opd-ray").get_all(key) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk(folder: Path, wanted_gb: int, advice: str) -> Finding:
    """Free disk where a folder is, or will be."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    if free >= wanted_gb:
        return Finding("ok", f"{free:.0f} GB free")
    return Finding("problem" if free < 1 else "warning", f"{free:.1f} GB free", advice)


def _first(items: list[str]) -> str:
    return "; ".join(items[:4]) + (f"; and {len(items) - 4} more" if len(items) > 4 else "")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
