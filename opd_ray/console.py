"""The one place that writes to the terminal."""

from rich.console import Console

__all__ = ["console", "errors"]

# Prompts, paths and names are shown as they are: no markup, no emoji codes.
console = Console(markup=False, emoji=False, highlight=False)
"""Results, and nothing else: what a script reads."""
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
"""Everything on the way: the live view, notes and errors."""
