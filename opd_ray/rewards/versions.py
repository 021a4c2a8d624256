"""Versions of the packages that draw or score, in this process's environment."""

import importlib.metadata
import platform

__all__ = ["packages"]

PACKAGES = (
    *("opd-ray", "torch", "torchvision", "diffusers", "transformers", "peft", "open_clip_torch", "rapidocr"),
    *("onnxruntime", "numpy", "pillow", "ray"),
)


def packages() -> dict[str, str]:
    """Python, and those of them that are here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
