"""How numbers, durations and names are written, in the same way wherever a person reads them."""

import math
from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "MISSING",
    "Write",
    "alike",
    "count",
    "duration",
    "join",
    "model_title",
    "number",
    "percent",
    "role_title",
    "size",
    "span",
]

Write = Callable[[float | None], str]

MISSING = "–"  # noqa: RUF001 (an en dash, also between the ends of a range)
"""Stands where there is no value."""

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def number(value: float | None) -> str:
    """Three significant digits, never fewer than the integer part needs."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 5 if abs(value) < 0.01 else 3)}f}"


def alike(values: Iterable[float | None]) -> Write:
    """How to write numbers that are compared: all with the decimals that the largest needs for three digits."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if not 1e-4 <= largest < 1e5:
        return number
    decimals = max(0, 3 - math.ceil(math.log10(largest)))

    def write(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return MISSING
        return f"{value:.{decimals}f}"

    return write


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(100 * value)} %".replace("-", "−")  # noqa: RUF001 (a minus sign)


def span(low: float | None, high: float | None, write: Write = number) -> str:
    """An interval, or nothing where a bound is missing."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{write(low)} to {write(high)}"


def duration(seconds: float | None) -> str:
    """A duration in the two largest units that matter."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(amount: float) -> str:
    """Bytes, in the units that disks are sold in: 1 GB is 1e9."""
    if amount < 1e9:
        return f"{amount / 1e6:.0f} MB" if amount >= 1e6 else "less than 1 MB"
    return f"{amount / 1e9:.1f} GB" if amount < 1e12 else f"{amount / 1e12:.1f} TB"


def count(amount: int, noun: str) -> str:
    """`1 round`, `80 rounds`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def join(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def model_title(model: str) -> str:
    """`teacher:text` as a heading; of `teacher:text, 4 steps` the steps stay behind."""
    name, comma, steps = model.partition(", ")
    return f"{name.removeprefix('teacher:')} teacher{comma}{steps}" if name.startswith("teacher:") else model


def role_title(role: str) -> str:
    """`teacher.text` as a heading."""
    return f"{role.removeprefix('teacher.')} teacher" if role.startswith("teacher.") else role
