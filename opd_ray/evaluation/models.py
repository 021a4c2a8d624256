"""What MODEL may be on the command line: a diffusers folder or hub id, a run folder, or `world` and `world/<name>`."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from opd_ray.config import Config, ModelConfig, parse
from opd_ray.errors import RunFolderError
from opd_ray.models.base import Family, load_family

__all__ = ["Loaded", "load_model"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to draw; its adapter, if it has one, is in use."""

    label: str
    family: Family
    guidance: float | None
    """The run's own, where MODEL is a run."""
    steps: int | None


def load_model(name: str, *, family: str = "sd3") -> Loaded:
    """Load MODEL with its text encoders and VAE.

    Raises:
        UserError: it is none of the three, or does not load.
    """
    if (Path(name) / "run.json").is_file():
        return _run(Path(name))
    base, lora = ("world", name) if name.startswith("world/") else (name, None)
    loaded = load_family(ModelConfig(family=family, path=base), text=True, image=True)
    if lora is not None:
        loaded.load_lora("lora", lora)
        loaded.use("lora")
    return Loaded(name, loaded, None, None)


def _run(folder: Path) -> Loaded:
    lora = folder / "lora" / "pytorch_lora_weights.safetensors"
    if not lora.is_file():
        raise RunFolderError(f"{folder} has no {lora.relative_to(folder)} yet; let the run end, or --resume it")
    config: Config = parse(yaml.safe_load((folder / "config.yaml").read_text()), str(folder / "config.yaml"))
    loaded = load_family(config.model, text=True, image=True)
    loaded.load_lora("student", str(lora.parent))
    loaded.use("student")
    return Loaded(str(folder), loaded, config.student.guidance, config.evaluation.steps)
