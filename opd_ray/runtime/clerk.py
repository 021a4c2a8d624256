"""The worker beside the driver that has the run folder where the others do not see it: ``cluster.storage: ship``."""

from collections.abc import Sequence
from pathlib import Path

from opd_ray.runtime.handle import Done
from opd_ray.storage import checkpoint
from opd_ray.storage.packing import Flat, Manifest, pack_files, unpack, unpack_files
from opd_ray.storage.pictures import write_png
from opd_ray.storage.run_folder import write_atomic

__all__ = ["ClerkHost"]


class ClerkHost:
    """Writes what other workers returned, and hands them what is there. The driver sees references alone."""

    def ready(self) -> Done:
        """It is up."""
        return Done(None, 0.0, 0)

    def commit(self, run_dir: str, round: int, attempt: int, keep: int, flat: Flat) -> Done:
        """Write a checkpoint that a learner rank serialised: its path."""
        path = checkpoint.commit(Path(run_dir), round, unpack_files(flat), attempt=attempt, keep=keep)
        return Done(str(path), 0.0, 0)

    def newest(self, run_dir: str) -> tuple[Flat, Done]:
        """The newest valid checkpoint (an empty array where there is none); its round and notes about damaged ones."""
        saved, notes = checkpoint.newest(Path(run_dir))
        contents = checkpoint.serialise(saved) if saved is not None else {}
        return pack_files(contents), Done((saved.round if saved is not None else 0, notes), 0.0, 0)

    def write(self, folder: str, flat: Flat) -> Done:
        """Files below a folder."""
        for name, content in unpack_files(flat).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        return Done(None, 0.0, 0)

    def pictures(self, files: Sequence[str], manifest: Manifest, flat: Flat) -> Done:
        """The first of these pictures as PNG files."""
        for file, image in zip(files, unpack(flat, manifest)["images"], strict=False):
            write_png(image, Path(file))
        return Done(None, 0.0, 0)
