"""On-policy distillation of text-to-image diffusion models, on Ray.

The names below are the public interface. Each is imported when it is first asked for, so that ``import opd_ray`` and
``opd-ray --help`` cost nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "SD",
    "SD3",
    "SDXL",
    "Algorithm",
    "Conditioning",
    "Config",
    "Experience",
    "Family",
    "Forward",
    "Loss",
    "ModelConfig",
    "OpdRayError",
    "Reward",
    "Stopped",
    "UserError",
    "WorkItem",
    "__version__",
    "check_family",
    "load_config",
    "train",
]

if TYPE_CHECKING:
    from opd_ray.algorithms import Algorithm, Forward, Loss
    from opd_ray.commands.train import run_training as train
    from opd_ray.config import Config, ModelConfig
    from opd_ray.errors import OpdRayError, Stopped, UserError
    from opd_ray.models import Family
    from opd_ray.models.sd3 import SD3
    from opd_ray.models.unet import SD, SDXL
    from opd_ray.recipes import load as load_config
    from opd_ray.rewards import Reward
    from opd_ray.testing import check_family
    from opd_ray.types import Conditioning, Experience, WorkItem
else:
    _HOMES = {
        "opd_ray.algorithms": ("Algorithm", "Forward", "Loss"),
        "opd_ray.config": ("Config", "ModelConfig"),
        "opd_ray.errors": ("OpdRayError", "Stopped", "UserError"),
        "opd_ray.models": ("Family",),
        "opd_ray.models.sd3": ("SD3",),
        "opd_ray.models.unet": ("SD", "SDXL"),
        "opd_ray.rewards": ("Reward",),
        "opd_ray.testing": ("check_family",),
        "opd_ray.types": ("Conditioning", "Experience", "WorkItem"),
    }
    _RENAMED = {"load_config": ("opd_ray.recipes", "load"), "train": ("opd_ray.commands.train", "run_training")}
    _WHERE = {name: (home, name) for home, names in _HOMES.items() for name in names} | _RENAMED

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'opd_ray' has no attribute {name!r}; its names are {', '.join(__all__)}")
        import importlib

        home, inside = _WHERE[name]
        return getattr(importlib.import_module(home), inside)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
