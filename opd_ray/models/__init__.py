"""Model families: encode prompts, predict a velocity, decode, and carry adapters. Knows no loss."""

from opd_ray.models.base import (
    FAMILIES,
    Family,
    check_adapters,
    family_class,
    load_family,
    read_shift,
    resolve,
    sigmas_of,
)
from opd_ray.models.lora import LoraInfo

__all__ = [
    "FAMILIES",
    "Family",
    "LoraInfo",
    "check_adapters",
    "family_class",
    "load_family",
    "read_shift",
    "resolve",
    "sigmas_of",
]
