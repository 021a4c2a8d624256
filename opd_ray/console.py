"""The one place that writes to the terminal."""

from rich.console import Console

__all__ = ["console", "errors"]

console = Console()
errors = Console(stderr=True)
