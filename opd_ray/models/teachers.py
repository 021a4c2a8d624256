"""Teachers as full checkpoints: what has to agree with the student's base, whose text encoders are used, their size."""

import filecmp
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from opd_ray.config import ModelConfig, TeacherConfig
from opd_ray.errors import ModelError
from opd_ray.models.base import Family, family_class, load_family
from opd_ray.models.checkpoint import fetch_part, read_config, refusing, resolve, weight_files

__all__ = ["Checkpoint", "check_checkpoint", "checkpoint_sha256", "same_text", "teacher_model"]

TEXT_PARTS = ("text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be loaded as a teacher; equal ones are the same weights in memory."""

    model: ModelConfig
    device: str
    dtype: torch.dtype
    text: bool
    """Whether its text encoders come along, to encode the prompts for itself."""

    def files(self) -> list[Path]:
        """What its weights are read from, downloaded where they are on a hub.

        Raises:
            ModelError: a part is missing or not whole.
        """
        parts = [family_class(self.model.family).denoiser_part]
        if self.text:
            index = read_config(self.model, "model_index.json")
            parts += [name for name, kind in index.items() if name.startswith("text_encoder") and kind[0] is not None]
        with refusing(f"model {self.model.path!r} is not whole"):
            return [file for part in parts for file in weight_files(fetch_part(self.model, part))]

    def nbytes(self) -> int:
        """Its weights' bytes once they are loaded, by the headers of its files alone."""
        return sum(_loaded_bytes(file, self.dtype) for file in self.files())

    def load(self) -> Family:
        """The denoiser, and the text encoders where they are its own."""
        return load_family(self.model, text=self.text, image=False, device=self.device, dtype=self.dtype)


def _loaded_bytes(file: Path, dtype: torch.dtype) -> int:
    """Of one file; numbers that are no floats, such as positions, keep their own format."""
    total = 0
    with safe_open(file, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118 (a file, not a mapping)
            tensor = content.get_slice(name)
            kind = tensor.get_dtype()
            size = dtype.itemsize if "F" in kind else int((re.findall(r"\d+", kind) or ["8"])[0]) // 8
            total += math.prod(tensor.get_shape()) * size
    return total


def teacher_model(student: ModelConfig, teacher: TeacherConfig) -> ModelConfig:
    """What a teacher's denoiser is loaded from: its own checkpoint, or the student's base under its LoRA."""
    if teacher.model is None:
        return student
    own = {"path": teacher.model, "revision": teacher.revision, "subfolder": teacher.subfolder}
    return student.model_copy(update=own)


def check_checkpoint(name: str, student: ModelConfig, teacher: ModelConfig) -> None:
    """A teacher reads the student's own states, so latent space, prediction and schedule have to be the same.

    Raises:
        ModelError: names what differs, with both values; nothing is loaded for it.
    """
    family = family_class(student.family)
    ours, theirs = family.fingerprint(student), family.fingerprint(teacher)
    differ = [
        f"{key} is {theirs.get(key)}, the student's {ours.get(key)}"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise ModelError(
            f"teacher {name!r} ({teacher.path}): {'; '.join(differ)}. It marks the student's own latents, so these "
            "have to agree; take a teacher of the same kind of model"
        )


def checkpoint_sha256(model: ModelConfig) -> str:
    """Of the denoiser's weight files, whatever number format they are loaded in."""
    total = hashlib.sha256()
    part = fetch_part(model, family_class(model.family).denoiser_part)
    for file in sorted(part.glob("*.safetensors")):
        with file.open("rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def same_text(student: ModelConfig, teacher: ModelConfig) -> bool:
    """Whether both encode prompts alike, file by file; where that cannot be told without a download, they do not."""
    if (student.path, student.revision, student.subfolder) == (teacher.path, teacher.revision, teacher.subfolder):
        return True
    ours, theirs = (Path(resolve(model.path), model.subfolder or "") for model in (student, teacher))
    if not (ours.is_dir() and theirs.is_dir()):
        return False
    files, others = _text_files(ours), _text_files(theirs)
    return files == others and all(filecmp.cmp(ours / file, theirs / file, shallow=False) for file in files)


def _text_files(folder: Path) -> set[Path]:
    parts = [part for part in folder.iterdir() if part.name.startswith(TEXT_PARTS)]
    return {file.relative_to(folder) for part in parts for file in part.rglob("*") if file.is_file()}
