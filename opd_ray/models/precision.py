"""What a role computes in."""

import torch

from opd_ray.config import Precision

__all__ = ["NAMES", "dtype_of"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """The number format of a role; ``auto`` depends on what the device has, so ask where it is."""
    if precision != "auto":
        return DTYPES[precision]
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
