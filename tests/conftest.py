"""What tests share: one tiny model with two teachers, and at most one Ray."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

import opd_ray.runtime  # noqa: F401  (before Ray, whose own processes then keep to the loopback address)

# Before torch is imported: processes that share two cores must not spin.
for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}.items():
    os.environ.setdefault(name, value)

# Other processes slow single examples down; pytest-timeout ends what hangs.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a random SD3."""
    from tests.models.tiny_sd3 import make_tiny_sd3

    return make_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_teachers(tiny, tmp_path_factory):
    """Name -> folder of a random LoRA (rank 4, alpha 8) over it, in diffusers' format."""
    import torch

    from opd_ray.config import LoraConfig, ModelConfig
    from opd_ray.models import load_family

    folders = {}
    for seed, name in enumerate(("a", "b")):
        family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
        family.add_lora("student", LoraConfig(rank=4, alpha=8), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in family.adapter_parameters("student").values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        folders[name] = tmp_path_factory.mktemp("teachers") / name
        family.save_lora("student", folders[name])
    return folders


@dataclass
class SmallDisk:
    """A mounted file system that is soon full."""

    folder: Path

    def enlarge(self, size: int) -> None:
        """Make room."""
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)

    def fill(self, left: int) -> None:
        """Leave so many bytes, in whole pages."""
        disk = os.statvfs(self.folder)
        with (self.folder / ".ballast").open("wb") as file:
            file.write(bytes(disk.f_bavail * disk.f_frsize - left))


@pytest.fixture
def small_disk():
    """Mount a file system of a few bytes on a folder, whose writes really fail; skips where that is not allowed."""
    mounted = []

    def mount(folder: Path, size: int) -> SmallDisk:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return SmallDisk(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def ray_session():
    """The one Ray of all tests, on this machine alone; runs join it."""
    import ray

    from opd_ray.runtime.cluster import RayBackend

    try:
        backend = RayBackend(object_store_mb=100)
    except Exception as error:  # Ray gives itself 30 s to start, which a busy machine may not keep
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        backend = RayBackend(object_store_mb=100)
    yield backend
    backend.close()
