"""What a role computes in."""

import torch

from opd_ray.config import Precision

__all__ = ["NAMES", "dtype_of", "is_full"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_full(precision: Precision, device: str) -> bool:
    """Whether a role computes in float32, told without asking the device."""
    return precision == "fp32" or (precision == "auto" and device == "cpu")


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """The number format of a role; ``auto`` depends on what the device has, so ask where it is."""
    if is_full(precision, device):
        return torch.float32
    if precision != "auto":
        return DTYPES[precision]
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
