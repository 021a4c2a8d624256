"""Teachers as full checkpoints: what has to agree with the student's base, and whose text encoders are used."""

import filecmp
import hashlib
from pathlib import Path

from opd_ray.config import ModelConfig, TeacherConfig
from opd_ray.errors import ModelError
from opd_ray.models.base import family_class
from opd_ray.models.checkpoint import fetch_part, resolve

__all__ = ["check_checkpoint", "checkpoint_sha256", "same_text", "teacher_model"]

TEXT_PARTS = ("text_encoder", "tokenizer")


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
