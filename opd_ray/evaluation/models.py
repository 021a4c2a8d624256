"""What MODEL may be on the command line: a diffusers folder or hub id, a run folder, `world`, or a base + a LoRA."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opd_ray.config import ModelConfig
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.models.base import Family, check_lora, family_class, load_family, resolve, trained_folder
from opd_ray.models.checkpoint import check_complete, read_config
from opd_ray.models.precision import dtype_of
from opd_ray.recipes import load, read

__all__ = ["Found", "find_model"]

PIPELINES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3"}
"""Which family a checkpoint of diffusers is of; any other is told by that of sd3."""
UNETS: dict[str, tuple[float, int, tuple[int, ...] | None]] = {"unet": (2.0, 50, None), "few": (1.0, 4, (1, 2, 4))}
"""The built-in U-Nets: guidance and steps that they are meant for, and the steps that they were distilled to."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model that is there and fits together; its weights are not loaded yet."""

    label: str
    model: ModelConfig
    lora: str | None = None
    denoiser: str | None = None
    """The folder of a fully trained one, in the place of the model's."""
    guidance: float | None = None
    """The run's own where MODEL is a run, and the demo's where it is of the built-in world."""
    steps: int | None = None
    start: str | None = None
    """The LoRA that a run's student began as."""

    def known_steps(self, steps: int) -> int:
        """That number of denoising steps, where a distilled model knows it.

        Raises:
            ConfigError: it, and those that the model knows.
        """
        known = self.model.distilled_steps
        if known is not None and steps not in known:
            raise ConfigError(
                f"--steps {steps}: {self.label} was distilled to {', '.join(map(str, known)) or 'no'} steps "
                "(model.distilled_steps); take one of these"
            )
        return steps

    def load(self, device: str = "") -> Family:
        """With text encoders, VAE and what was trained, if there is anything, in use.

        Args:
            device: to compute on; a card where there is one, if not given.

        Raises:
            UserError: some of its weights do not load.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        family = load_family(self.model, text=True, image=True, device=device, dtype=dtype_of("auto", device))
        if self.denoiser is not None:
            family.load_own(Path(self.denoiser))
        if self.lora is not None:
            family.load_lora("lora", self.lora)
            family.use("lora")
        return family


def find_model(name: str) -> Found:
    """What MODEL stands for, checked as far as it goes without loading weights.

    Raises:
        UserError: it is none of them, or its LoRA does not fit.
    """
    path = Path(name)
    if "+" in name and not path.exists():
        return _with_lora(name)
    found = _run(path) if (path / "run.json").is_file() else _world(name) if resolve(name) != name else _other(path)
    if found.lora is not None:
        check_lora(found.model, found.lora)
    family_class(found.model.family).read_schedule(found.model)
    check_complete(found.model)
    return found


def _with_lora(name: str) -> Found:
    """BASE+LORA: any base under any LoRA that fits, drawn with as the base is."""
    base, _, lora = name.partition("+")
    found = find_model(base)
    if found.lora is not None:
        raise ConfigError(f"{name}: {base} has a LoRA of its own; give the base of both, then + and the LoRA")
    check_lora(found.model, lora)
    return replace(found, label=name, lora=lora)


def _world(name: str) -> Found:
    demo, own = load("demo"), name.partition("/")[2]
    if own in UNETS:
        guidance, steps, known = UNETS[own]
        model = ModelConfig(family="sd", path=name, distilled_steps=known)
        return Found(name, model, guidance=guidance, steps=steps)
    teachers = {teacher.lora: teacher.guidance for teacher in demo.teachers.values()}
    guidance = teachers.get(name, demo.student.guidance)
    lora = name if "/" in name else None
    return Found(name, ModelConfig(path="world"), lora, guidance=guidance, steps=demo.evaluation.steps[0])


def _other(path: Path) -> Found:
    runs = sorted(run.parent.name for run in path.parent.glob("*/run.json"))
    if runs and not path.exists():  # before a hub is asked for it
        raise RunFolderError(f"{path}: no such run; {path.parent} has {', '.join(runs)}")
    if path.is_file():
        raise RunFolderError(f"{path} is a file; give a diffusers folder, a hub id or a run folder")
    if (path / "pytorch_lora_weights.safetensors").is_file():
        raise RunFolderError(
            f"{path} is a LoRA without its base; give its run folder, for instance {path.parent}, or BASE+{path}"
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        inside = ", ".join(sorted(run.parent.name for run in path.glob("*/run.json")))
        hint = f"its runs are {inside}" if inside else "there is neither model_index.json nor run.json in it"
        raise RunFolderError(f"{path} is no diffusers folder and no run folder; {hint}")
    model = ModelConfig(path=str(path))
    kind = str(read_config(model, "model_index.json").get("_class_name"))
    return Found(str(path), model.model_copy(update={"family": PIPELINES.get(kind, model.family)}))


def _run(folder: Path) -> Found:
    files = [folder / "lora" / "pytorch_lora_weights.safetensors"]
    files += [folder / part / "config.json" for part in ("transformer", "unet")]
    if not any(file.is_file() for file in files):
        *names, last = (str(file.relative_to(folder)) for file in files)
        raise RunFolderError(f"{folder} has no {', '.join(names)} or {last} yet; let the run end, or --resume it")
    config = read(folder / "config.yaml")
    trained = folder / trained_folder(config.model, config.student)
    lora, denoiser = (None, str(trained)) if config.student.lora is None else (str(trained), None)
    steps, known = config.evaluation.steps[0], config.model.distilled_steps
    if known is not None and steps not in known:  # it was never evaluated: the default
        steps = config.sampling.steps
    start = config.student.lora.start if config.student.lora else None
    return Found(str(folder), config.model, lora, denoiser, config.student.guidance, steps, start)
