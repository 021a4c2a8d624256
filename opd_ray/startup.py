"""Where the time goes until the first drawing."""

import time
from collections.abc import Callable

from opd_ray.report.wording import duration

__all__ = ["Startup"]


class Startup:
    """Seconds from the command to the first drawing, by part."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[str, float] = {}
        self._clock, self._since = clock, clock()

    def mark(self, part: str) -> None:
        """What went on since the last mark."""
        now = self._clock()
        self.parts[part] = round(self.parts.get(part, 0.0) + now - self._since, 3)
        self._since = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.parts.items())
        return f"first drawing after {duration(sum(self.parts.values()))}: {parts}"
